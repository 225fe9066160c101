//! Instructions that map registers to a register: one entry point per instruction, one thread per tuple of inputs.
//! What a thread gets may depend on the other threads' inputs: so warp collectives, barriers and atomics fit the form too.
//!
//! The image of such a family is written from its table, so the instruction's text and its expected values stand on
//! one line of the family's file, and the committed file can be read, assembled and launched by itself.

use super::number::{BF16, F16};
use super::{Arg, Case, Format, Half, Want};

/// A type that can stand in a register and in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ty {
    B8,
    B16,
    B32,
    B64,
    F16,
    Bf16,
    F16x2,
    Bf16x2,
    E4m3x2,
    E5m2x2,
    F32,
    F64,
}

impl Ty {
    pub fn bytes(self) -> usize {
        match self {
            Ty::B8 => 1,
            Ty::B16 | Ty::F16 | Ty::Bf16 | Ty::E4m3x2 | Ty::E5m2x2 => 2,
            Ty::B32 | Ty::F16x2 | Ty::Bf16x2 | Ty::F32 => 4,
            Ty::B64 | Ty::F64 => 8,
        }
    }

    /// Register class; bytes travel in 16-bit registers.
    fn register(self) -> &'static str {
        match self {
            Ty::B8 | Ty::B16 | Ty::F16 | Ty::Bf16 | Ty::E4m3x2 | Ty::E5m2x2 => ".b16",
            Ty::B32 | Ty::F16x2 | Ty::Bf16x2 => ".b32",
            Ty::F32 => ".f32",
            Ty::B64 => ".b64",
            Ty::F64 => ".f64",
        }
    }

    fn format(self) -> Format {
        match self {
            Ty::F16 => Format::F16,
            Ty::Bf16 => Format::Bf16,
            Ty::F16x2 => Format::F16x2,
            Ty::Bf16x2 => Format::Bf16x2,
            Ty::E4m3x2 => Format::E4m3x2,
            Ty::E5m2x2 => Format::E5m2x2,
            Ty::F32 => Format::F32,
            Ty::F64 => Format::F64,
            _ => Format::Bits(self.bytes()),
        }
    }

    /// Values worth trying: zero, one, signs, extremes, and for floats subnormals, infinities and NaN.
    pub fn edges(self) -> Vec<u64> {
        const SMALL: [u64; 6] = [0, 1, 2, 3, 7, 31];
        let integers = |bits: u32, more: &[u64]| {
            let (top, all) = (1u64 << (bits - 1), u64::MAX >> (64 - bits));
            let mut edges = SMALL.to_vec();
            edges.extend([top - 1, top, top + 1, all - 1, all, u64::from(bits) - 1, u64::from(bits), u64::from(bits) + 1]);
            edges.extend(more.iter().map(|&x| x & all));
            edges.sort_unstable();
            edges.dedup();
            edges
        };
        match self {
            Ty::B8 => (0..=255).collect(),
            // Every code in both halves.
            Ty::E4m3x2 | Ty::E5m2x2 => (0..256).map(|code| code | ((code * 7 + 3) & 0xFF) << 8).collect(),
            Ty::B16 => integers(16, &[0x1234, 0xABCD, 100, 0xFF9C, 0x5555, 0x00FF]),
            Ty::B32 => integers(32, &[0x1234_5678, 0x89AB_CDEF, 0xFFFF_FF9C, 1000, 0x0000_FFFF, 0x5555_5555, 0x00FF_00FF]),
            Ty::B64 => integers(64, &[0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210, 1000, 0xFFFF_FFFF, 1 << 32, 0xFFFF_FFFF_FFFF_FC18]),
            Ty::F16 => vec![
                0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3800, 0x3C00, 0xBC00, 0x3C01, 0x3E00, 0xC100, 0x4248, 0x4D00, 0x7BFF,
                0xFBFF, 0x7C00, 0xFC00, 0x7E00,
            ],
            Ty::Bf16 => vec![
                0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F00, 0x3F80, 0xBF80, 0x3F81, 0x3FC0, 0xC020, 0x4049, 0x4316, 0x7F7F,
                0xFF7F, 0x7F80, 0xFF80, 0x7FC0,
            ],
            // The edges of a half beside the same list shifted, so that both halves differ.
            Ty::F16x2 => packed(&Ty::F16.edges()),
            Ty::Bf16x2 => packed(&Ty::Bf16.edges()),
            Ty::F32 => [
                0.0f32,
                -0.0,
                f32::from_bits(1),
                f32::from_bits(0x8000_0001),
                f32::from_bits(0x007F_FFFF),
                f32::MIN_POSITIVE,
                -f32::MIN_POSITIVE,
                0.5,
                1.0,
                -1.0,
                1.0 + f32::EPSILON,
                1.5,
                -2.5,
                std::f32::consts::PI,
                1e-20,
                -1e10,
                16_777_217.0,
                1e30,
                f32::MAX,
                f32::MIN,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::NAN,
                0.1,
                -0.3,
            ]
            .iter()
            .map(|x| u64::from(x.to_bits()))
            .collect(),
            Ty::F64 => [
                0.0f64,
                -0.0,
                f64::from_bits(1),
                f64::MIN_POSITIVE,
                0.5,
                1.0,
                -1.0,
                1.0 + f64::EPSILON,
                -2.5,
                std::f64::consts::PI,
                1e-20,
                -1e10,
                0.1,
                -0.3,
                1e300,
                f64::MAX,
                f64::INFINITY,
                f64::NEG_INFINITY,
                f64::NAN,
            ]
            .iter()
            .map(|x| x.to_bits())
            .collect(),
        }
    }
}

fn packed(halves: &[u64]) -> Vec<u64> {
    (0..halves.len()).map(|i| halves[i] | halves[(5 * i + 3) % halves.len()] << 16).collect()
}

/// One instruction of a family.
pub struct Op {
    /// What is tested; with dots as underscores, the name of its entry point.
    pub name: String,
    /// Instructions that set %d from %a, %b, %c.
    pub body: String,
    pub inputs: Vec<Ty>,
    pub output: Ty,
    /// Declarations in front of the entry: module variables, functions.
    pub prelude: String,
    /// Directives between the entry's parameters and its body.
    pub directives: String,
    /// CTAs, all of one cluster. With more than one, %i still counts all threads.
    pub ctas: u32,
    pub values: Values,
    /// See [`Case::beyond_isa`].
    pub beyond_isa: Option<&'static str>,
    want: Box<WantOf>,
}

/// From every thread's inputs and a thread's index to what that thread must write.
type WantOf = dyn Fn(&[Vec<u64>], usize) -> Want + Send + Sync;

/// Where the inputs come from.
pub enum Values {
    /// Every combination of the edges of the types.
    Edges,
    /// Every combination of these, a list per operand.
    Product(Vec<Vec<u64>>),
    /// A tuple per thread.
    Threads(Vec<Vec<u64>>),
}

const REGISTERS: [&str; 3] = ["%a", "%b", "%c"];

impl Op {
    /// `name %d, %a, %b, ..;`
    pub fn new(name: &str, inputs: &[Ty], output: Ty, want: impl Fn(&[u64]) -> Want + Send + Sync + 'static) -> Op {
        let operands: String = REGISTERS[..inputs.len()].iter().map(|r| format!(", {r}")).collect();
        Op {
            name: name.to_string(),
            body: format!("{name} %d{operands};"),
            inputs: inputs.to_vec(),
            output,
            prelude: String::new(),
            directives: String::new(),
            ctas: 1,
            values: Values::Edges,
            beyond_isa: None,
            want: Box::new(move |tuples, i| want(&tuples[i])),
        }
    }

    /// A body whose result in thread `i` depends on the inputs of all `threads`.
    pub fn across<const N: usize>(
        name: &str,
        body: &str,
        inputs: [Ty; N],
        output: Ty,
        threads: Vec<[u64; N]>,
        want: impl Fn(&[Vec<u64>], usize) -> u64 + Send + Sync + 'static,
    ) -> Op {
        Op {
            name: name.to_string(),
            body: body.to_string(),
            inputs: inputs.to_vec(),
            output,
            prelude: String::new(),
            directives: String::new(),
            ctas: 1,
            values: Values::Threads(threads.into_iter().map(|tuple| tuple.to_vec()).collect()),
            beyond_isa: None,
            want: Box::new(move |tuples, i| Want::Bits(want(tuples, i) & (u64::MAX >> (64 - 8 * output.bytes())))),
        }
    }

    /// Declarations in front of the entry.
    pub fn prelude(mut self, text: &str) -> Op {
        self.prelude = text.to_string();
        self
    }

    /// The same under another name with another text.
    pub fn body(mut self, name: &str, body: &str) -> Op {
        self.name = name.to_string();
        self.body = body.to_string();
        self
    }

    /// These inputs in place of the edges of the types.
    pub fn values(mut self, values: &[&[u64]]) -> Op {
        self.values = Values::Product(values.iter().map(|v| v.to_vec()).collect());
        self
    }

    pub fn directives(mut self, text: &str) -> Op {
        self.directives = format!("{text}\n");
        self
    }

    /// The threads are those of a cluster of `ctas`.
    pub fn cluster(mut self, ctas: u32) -> Op {
        self.ctas = ctas;
        self
    }

    /// Marks an expectation that says more than the ISA promises.
    pub fn beyond_isa(mut self, why: &'static str) -> Op {
        self.beyond_isa = Some(why);
        self
    }

    fn entry(&self) -> String {
        self.name.replace('%', "").replace([':', '.', ' '], "_")
    }

    fn ptx(&self) -> String {
        let parameters: String = (0..self.inputs.len()).map(|i| format!(", .param .u64 in{i}")).collect();
        let prelude = if self.prelude.is_empty() { String::new() } else { format!("\n{}\n", self.prelude.trim_end()) };
        let mut text = format!(
            "{prelude}\n.visible .entry {}(.param .u64 out{parameters})\n{}{{\n\t.reg .b32 %i;\n\t.reg .b64 %p;\n",
            self.entry(),
            self.directives
        );
        for (ty, register) in self.inputs.iter().chain([&self.output]).zip(REGISTERS[..self.inputs.len()].iter().chain(&["%d"])) {
            text += &format!("\t.reg {} {register};\n", ty.register());
        }
        text += "\tmov.u32 %i, %tid.x;\n";
        if self.ctas > 1 {
            text +=
                "\t{\n\t.reg .b32 cta, size;\n\tmov.u32 cta, %ctaid.x;\n\tmov.u32 size, %ntid.x;\n\tmad.lo.u32 %i, cta, size, %i;\n\t}\n";
        }
        for (i, ty) in self.inputs.iter().enumerate() {
            text += &format!("\tld.param.u64 %p, [in{i}];\n\tmad.wide.u32 %p, %i, {}, %p;\n", ty.bytes());
            text += &format!("\tld.global.{} {}, [%p];\n", memory_type(*ty), REGISTERS[i]);
        }
        for line in self.body.lines() {
            text += &format!("\t{line}\n");
        }
        text += &format!("\tld.param.u64 %p, [out];\n\tmad.wide.u32 %p, %i, {}, %p;\n", self.output.bytes());
        text + &format!("\tst.global.{} [%p], %d;\n\tret;\n}}\n", memory_type(self.output))
    }

    fn case(&self, image: &'static str) -> Case {
        let tuples = match &self.values {
            Values::Edges => product(&self.inputs.iter().map(|ty| ty.edges()).collect::<Vec<_>>()),
            Values::Product(columns) => product(columns),
            Values::Threads(tuples) => tuples.clone(),
        };
        self.case_of(image, &tuples)
    }

    /// The case with these inputs, one tuple per thread.
    pub fn case_of(&self, image: &'static str, tuples: &[Vec<u64>]) -> Case {
        let threads = tuples.len();
        let mut args = vec![Arg::values(self.output.format(), (0..threads).map(|i| (self.want)(tuples, i)).collect())];
        for (i, ty) in self.inputs.iter().enumerate() {
            let column: Vec<u64> = tuples.iter().map(|tuple| tuple[i]).collect();
            args.push(Arg::input(super::bytes_of(&column, ty.bytes())));
        }
        let case = Case::new(&self.name, image, self.entry(), threads as u32 / self.ctas, args).grid(self.ctas).cluster(self.ctas);
        Case { beyond_isa: self.beyond_isa, ..case }
    }
}

fn memory_type(ty: Ty) -> &'static str {
    match ty {
        Ty::B8 => "b8",
        Ty::F32 => "f32",
        Ty::F64 => "f64",
        Ty::B64 => "b64",
        _ if ty.bytes() == 2 => "b16",
        _ => "b32",
    }
}

/// Every combination if they fit one block; otherwise 1024 of them, spread evenly by a stride prime to the count.
/// The list is padded with its first tuple to whole warps.
fn product(columns: &[Vec<u64>]) -> Vec<Vec<u64>> {
    let total: usize = columns.iter().map(Vec::len).product();
    let stride = if total <= 1024 { 1 } else { 7919 };
    let mut tuples: Vec<Vec<u64>> = (0..total.min(1024))
        .map(|i| {
            let mut index = i * stride % total;
            columns
                .iter()
                .map(|column| {
                    let value = column[index % column.len()];
                    index /= column.len();
                    value
                })
                .collect()
        })
        .collect();
    while !tuples.len().is_multiple_of(32) {
        tuples.push(tuples[0].clone());
    }
    tuples
}

/// The committed text of a family, written from its table.
pub fn image(title: &str, ops: &[Op]) -> String {
    let mut text = format!("// {title}\n// Written from the tables of tests/cases/families; one thread per tuple of inputs.\n");
    text += ".version 8.4\n.target sm_90a\n.address_size 64\n";
    for op in ops {
        text += &op.ptx();
    }
    text
}

pub fn cases(image: &'static str, ops: &[Op]) -> Vec<Case> {
    ops.iter().map(|op| op.case(image)).collect()
}

/// Rust's type for a register: how an expected value is written down.
pub trait Value: Copy + 'static {
    const TY: Ty;
    fn from_bits(bits: u64) -> Self;
    fn want(self) -> Want;
}

macro_rules! integer_value {
    ($($ty:ty => $code:ident),*) => {$(
        impl Value for $ty {
            const TY: Ty = Ty::$code;
            fn from_bits(bits: u64) -> Self {
                bits as $ty
            }
            fn want(self) -> Want {
                Want::Bits(self as u64 & (u64::MAX >> (64 - <$ty>::BITS)))
            }
        }
    )*};
}
integer_value!(u8 => B8, i8 => B8, u16 => B16, i16 => B16, u32 => B32, i32 => B32, u64 => B64, i64 => B64);

impl Value for f32 {
    const TY: Ty = Ty::F32;
    fn from_bits(bits: u64) -> Self {
        f32::from_bits(bits as u32)
    }
    fn want(self) -> Want {
        if self.is_nan() { Want::Nan } else { Want::Bits(u64::from(self.to_bits())) }
    }
}

impl Value for f64 {
    const TY: Ty = Ty::F64;
    fn from_bits(bits: u64) -> Self {
        f64::from_bits(bits)
    }
    fn want(self) -> Want {
        if self.is_nan() { Want::Nan } else { Want::Bits(self.to_bits()) }
    }
}

pub fn unary<A: Value, D: Value>(name: &str, f: fn(A) -> D) -> Op {
    Op::new(name, &[A::TY], D::TY, move |x| f(A::from_bits(x[0])).want())
}

pub fn binary<A: Value, B: Value, D: Value>(name: &str, f: fn(A, B) -> D) -> Op {
    Op::new(name, &[A::TY, B::TY], D::TY, move |x| f(A::from_bits(x[0]), B::from_bits(x[1])).want())
}

pub fn ternary<A: Value, B: Value, C: Value, D: Value>(name: &str, f: fn(A, B, C) -> D) -> Op {
    Op::new(name, &[A::TY, B::TY, C::TY], D::TY, move |x| f(A::from_bits(x[0]), B::from_bits(x[1]), C::from_bits(x[2])).want())
}

/// A 16-bit float operation, from its exact result as an `f64` rounded to odd; `packed` makes it the x2 form.
pub fn half_op(name: &str, ty: Ty, arity: usize, exact: fn(&[f64]) -> f64, finish: fn(Ty, f64) -> Half) -> Op {
    let (scalar, format) = match ty {
        Ty::F16 | Ty::F16x2 => (Ty::F16, F16),
        _ => (Ty::Bf16, BF16),
    };
    let is_packed = scalar != ty;
    Op::new(name, &vec![ty; arity], ty, move |x| {
        let half = |shift: u32| finish(scalar, exact(&x.iter().map(|bits| format.value(bits >> shift & 0xFFFF)).collect::<Vec<_>>()));
        match (is_packed, half(0)) {
            (true, low) => Want::Pair(low, half(16)),
            (false, Half::Bits(bits)) => Want::Bits(u64::from(bits)),
            (false, Half::Nan) => Want::Nan,
            (false, Half::Near { value, relative }) => Want::Near { value, relative, absolute: 0.0 },
        }
    })
}
