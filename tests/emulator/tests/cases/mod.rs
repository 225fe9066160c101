//! What each PTX instruction must do: images, launches, inputs and expected outputs, as plain data.
//!
//! Nothing here knows who runs a case. The emulator's tests do, and `tests/instructions.rs` at the repository's root runs the same images
//! with the same parameters on a GPU where there is one: a launcher reads `kernels/instructions/<image>.ptx`, makes one device buffer per [`Arg::Buffer`],
//! packs the parameters as [`layout`] says, launches, and hands the bytes it reads back to [`Case::verdict`].
//!
//! Expected values are worked out from the text of the PTX ISA in plain Rust; where the ISA leaves bits open (NaN
//! payloads, approximate functions) the expectation is a set or an interval.

#![allow(dead_code)] // each test binary uses its own part
#![allow(clippy::type_complexity)] // a table of names and functions says what it is

pub mod elementwise;
pub mod number;

pub mod families;

/// One launch and what it must leave behind.
pub struct Case {
    /// Instruction and variant, for messages.
    pub name: String,
    /// Stem of a file of `kernels/instructions/`.
    pub image: &'static str,
    pub entry: String,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub cluster: [u32; 3],
    /// Dynamic shared memory.
    pub shared_bytes: u32,
    /// The arguments are the fields of one C struct, which is padded at its end; otherwise each is a parameter of its own.
    pub one_struct: bool,
    /// How many of the arguments are parameters; those behind are buffers that only tensor maps lead to.
    pub params: usize,
    pub args: Vec<Arg>,
    /// Why the expectation says more than the ISA promises, where it does; hardware may then differ without either being wrong.
    pub beyond_isa: Option<&'static str>,
}

/// A kernel parameter, in declaration order.
pub enum Arg {
    U8(u8),
    U16(u16),
    U32(u32),
    U64(u64),
    /// The address of a device buffer with these contents, and what it must hold afterwards.
    Buffer {
        before: Vec<u8>,
        after: Expect,
    },
    /// A tensor map over the buffer that is argument `of`.
    Map(TensorMap),
}

/// The arguments of the driver's tiled tensor map encoder, innermost dimension first.
#[derive(Clone)]
pub struct TensorMap {
    pub of: usize,
    pub element: Element,
    pub dims: Vec<u64>,
    /// Bytes from one index to the next, for every dimension but the innermost.
    pub strides: Vec<u64>,
    pub tile: Vec<u32>,
    pub swizzle: Swizzle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    U8,
    U16,
    U32,
    F16,
    Bf16,
    F32,
}

impl Element {
    pub fn bytes(self) -> usize {
        match self {
            Element::U8 => 1,
            Element::U16 | Element::F16 | Element::Bf16 => 2,
            Element::U32 | Element::F32 => 4,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    None,
    B32,
    B64,
    B128,
}

impl Swizzle {
    /// Bytes of a row under this swizzle.
    pub fn span(self) -> usize {
        match self {
            Swizzle::None => 16,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        }
    }

    /// Where the byte at shared-memory address `at` of the unswizzled picture really lies.
    pub fn apply(self, at: usize) -> usize {
        match self {
            Swizzle::None => at,
            Swizzle::B32 => at ^ ((at >> 7) & 1) << 4,
            Swizzle::B64 => at ^ ((at >> 7) & 3) << 4,
            Swizzle::B128 => at ^ ((at >> 7) & 7) << 4,
        }
    }
}

/// What a buffer must hold after the launch.
pub enum Expect {
    Unchanged,
    /// Not looked at.
    Anything,
    Bytes(Vec<u8>),
    /// One expectation per element.
    Values(Format, Vec<Want>),
    /// For results that depend on the order of threads: a sentence when the bytes are wrong.
    Judge(Box<dyn Fn(&[u8]) -> Option<String> + Send + Sync>),
}

/// How the bits of an element are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Bits(usize),
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    E4m3x2,
    E5m2x2,
    F32,
    F64,
}

/// One expected element.
#[derive(Clone, Copy, Debug)]
pub enum Want {
    Bits(u64),
    /// The two halves of a packed element, low one first.
    Pair(Half, Half),
    /// Any NaN of the format.
    Nan,
    /// Within `relative` of the value or within `absolute` of it.
    Near {
        value: f64,
        relative: f64,
        absolute: f64,
    },
}

/// One half of a packed element.
#[derive(Clone, Copy, Debug)]
pub enum Half {
    Bits(u16),
    Nan,
    Near { value: f64, relative: f64 },
}

impl Format {
    pub fn bytes(self) -> usize {
        match self {
            Format::Bits(bytes) => bytes,
            Format::F16 | Format::Bf16 | Format::E4m3x2 | Format::E5m2x2 => 2,
            Format::F16x2 | Format::Bf16x2 | Format::F32 => 4,
            Format::F64 => 8,
        }
    }

    fn value(self, bits: u64) -> f64 {
        match self {
            Format::Bits(_) => bits as f64,
            Format::F16 | Format::F16x2 => number::F16.value(bits),
            Format::Bf16 | Format::Bf16x2 => number::BF16.value(bits),
            Format::E4m3x2 => number::E4M3.value(bits),
            Format::E5m2x2 => number::E5M2.value(bits),
            Format::F32 => f64::from(f32::from_bits(bits as u32)),
            Format::F64 => f64::from_bits(bits),
        }
    }
}

fn near(got: f64, value: f64, relative: f64, absolute: f64) -> bool {
    if value.is_nan() {
        return got.is_nan();
    }
    got == value || (got - value).abs() <= relative * value.abs() || (got - value).abs() <= absolute
}

impl Want {
    fn accepts(&self, format: Format, bits: u64) -> bool {
        match *self {
            Want::Bits(want) => bits == want,
            Want::Nan => format.value(bits).is_nan(),
            Want::Near { value, relative, absolute } => near(format.value(bits), value, relative, absolute),
            Want::Pair(low, high) => {
                let width = 4 * format.bytes();
                [(low, bits & ((1 << width) - 1)), (high, bits >> width)].iter().all(|&(want, bits)| match want {
                    Half::Bits(want) => bits == u64::from(want),
                    Half::Nan => format.value(bits).is_nan(),
                    Half::Near { value, relative } => near(format.value(bits), value, relative, 0.0),
                })
            }
        }
    }
}

impl Case {
    /// One block, no cluster and no dynamic shared memory, unless said otherwise.
    pub fn new(name: impl Into<String>, image: &'static str, entry: impl Into<String>, threads: u32, args: Vec<Arg>) -> Case {
        Case {
            name: name.into(),
            image,
            entry: entry.into(),
            grid: [1, 1, 1],
            block: [threads, 1, 1],
            cluster: [1, 1, 1],
            shared_bytes: 0,
            one_struct: false,
            params: args.len(),
            args,
            beyond_isa: None,
        }
    }

    /// A kernel whose arguments are one struct.
    pub fn kernel(name: &'static str, grid: [u32; 3], block: u32, args: Vec<Arg>) -> Case {
        Case { grid, one_struct: true, ..Case::new(name, name, name, block, args) }
    }

    pub fn grid(mut self, blocks: u32) -> Case {
        self.grid = [blocks, 1, 1];
        self
    }

    pub fn cluster(mut self, blocks: u32) -> Case {
        self.cluster = [blocks, 1, 1];
        self
    }

    pub fn shared(mut self, bytes: u32) -> Case {
        self.shared_bytes = bytes;
        self
    }

    /// Marks an expectation that says more than the ISA promises.
    pub fn beyond_isa(mut self, why: &'static str) -> Case {
        self.beyond_isa = Some(why);
        self
    }

    /// Compares argument `index` after the launch; `None` is agreement.
    pub fn verdict(&self, index: usize, got: &[u8]) -> Option<String> {
        let Arg::Buffer { before, after } = &self.args[index] else { return None };
        let bytes_differ = |want: &[u8]| {
            let at = got.iter().zip(want).position(|(g, w)| g != w)?;
            let count = got.iter().zip(want).filter(|(g, w)| g != w).count();
            Some(format!("byte {at} is 0x{:02x}, expected 0x{:02x}; {count} of {} bytes differ", got[at], want[at], want.len()))
        };
        match after {
            Expect::Anything => None,
            Expect::Unchanged => bytes_differ(before),
            Expect::Bytes(want) => bytes_differ(want),
            Expect::Judge(judge) => judge(got),
            Expect::Values(format, wants) => {
                let width = format.bytes();
                let element = |i: usize| {
                    let mut bits = [0; 8];
                    bits[..width].copy_from_slice(&got[i * width..(i + 1) * width]);
                    u64::from_le_bytes(bits)
                };
                let wrong: Vec<usize> = (0..wants.len()).filter(|&i| !wants[i].accepts(*format, element(i))).collect();
                let &first = wrong.first()?;
                let bits = element(first);
                Some(format!(
                    "element {first} is 0x{bits:0digits$x} ({}), expected {:x?}{}; {} of {} differ",
                    format.value(bits),
                    wants[first],
                    self.inputs_of(first),
                    wrong.len(),
                    wants.len(),
                    digits = 2 * width
                ))
            }
        }
    }

    /// The elements of the unchanged buffers that stand at position `i`, for messages of elementwise cases.
    fn inputs_of(&self, i: usize) -> String {
        let mut text = String::new();
        for arg in &self.args {
            if let Arg::Buffer { before, after: Expect::Unchanged } = arg {
                let width = before.len() / self.block[0] as usize;
                if width > 0 && width <= 8 && before.len() == width * self.block[0] as usize {
                    let hex: String = before[i * width..(i + 1) * width].iter().rev().map(|b| format!("{b:02x}")).collect();
                    text += &format!(" from 0x{hex}");
                }
            }
        }
        text
    }
}

impl Arg {
    pub fn input(before: impl Into<Vec<u8>>) -> Arg {
        Arg::Buffer { before: before.into(), after: Expect::Unchanged }
    }

    /// A buffer that the kernel writes in full: it starts as 0xD5 everywhere.
    pub fn output(want: impl Into<Vec<u8>>) -> Arg {
        let want = want.into();
        Arg::Buffer { before: vec![0xD5; want.len()], after: Expect::Bytes(want) }
    }

    pub fn values(format: Format, wants: Vec<Want>) -> Arg {
        Arg::Buffer { before: vec![0xD5; wants.len() * format.bytes()], after: Expect::Values(format, wants) }
    }

    fn size_and_alignment(&self) -> (usize, usize) {
        match self {
            Arg::U8(_) => (1, 1),
            Arg::U16(_) => (2, 2),
            Arg::U32(_) => (4, 4),
            Arg::U64(_) | Arg::Buffer { .. } => (8, 8),
            Arg::Map(_) => (128, 128),
        }
    }
}

/// Offset of every parameter in the launch's parameter block, and the block's size.
pub fn layout(case: &Case) -> (Vec<usize>, usize) {
    let (mut end, mut widest) = (0usize, 1);
    let offsets = case.args[..case.params]
        .iter()
        .map(|arg| {
            let (size, alignment) = arg.size_and_alignment();
            let at = end.next_multiple_of(alignment);
            end = at + size;
            widest = widest.max(alignment);
            at
        })
        .collect();
    (offsets, if case.one_struct { end.next_multiple_of(widest) } else { end })
}

/// Little-endian bytes of a list of numbers.
pub fn bytes_of<T: Copy + Into<u64>>(values: &[T], width: usize) -> Vec<u8> {
    values.iter().flat_map(|&v| v.into().to_le_bytes()[..width].to_vec()).collect()
}

pub fn u32s(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn u64s(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// bf16 bytes of numbers that the format holds exactly.
pub fn bf16s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect()
}

/// Small integers that follow no pattern a wrong index could preserve: a hash of the position, in -limit..=limit.
pub fn scrambled(count: usize, seed: u64, limit: i64) -> Vec<f32> {
    (0..count as u64)
        .map(|i| {
            let mut x = (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ seed.wrapping_mul(0xD1B5_4A32_D192_ED03);
            x = (x ^ x >> 29).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            ((x >> 33) as i64 % (2 * limit + 1) - limit) as f32
        })
        .collect()
}
