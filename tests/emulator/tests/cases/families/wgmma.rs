//! wgmma: every N, every operand type, K-major and MN-major operands in every swizzle, A from registers, scales and signs.
//!
//! An entry copies two prepared pictures of shared memory, fences, multiplies once and writes each thread's accumulators
//! as they lie in its registers. Inputs are small integers, so sums are exact in any order.

use super::super::number::{BF16, Binary, E4M3, E5M2, F16, Mode};
use super::super::{Arg, Case, Swizzle, f32s, scrambled, u32s};
use super::Family;

pub fn family() -> Family {
    let mut text = String::from(
        "// wgmma with 64 rows, N columns and 32 bytes of k, once.\n\
         // Written from tests/cases/families/wgmma.rs. Shared memory holds the picture of A (none if A comes from registers), then that of B.\n\
         .version 8.4\n.target sm_90a\n.address_size 64\n\n.extern .shared .align 1024 .b8 tile[];\n",
    );
    for entry in entries() {
        text += &entry.ptx();
    }
    Family::table("wgmma", text, cases())
}

/// Operand types of one instruction.
#[derive(Clone, Copy, PartialEq)]
struct Types {
    a: Number,
    b: Number,
}

/// An operand type: its PTX name, format and the entries of 32 bytes.
#[derive(Clone, Copy, PartialEq)]
enum Number {
    F16,
    Bf16,
    Tf32,
    E4m3,
    E5m2,
    S8,
    U8,
}

impl Number {
    fn name(self) -> &'static str {
        match self {
            Number::F16 => "f16",
            Number::Bf16 => "bf16",
            Number::E4m3 => "e4m3",
            Number::E5m2 => "e5m2",
            Number::Tf32 => "tf32",
            Number::S8 => "s8",
            Number::U8 => "u8",
        }
    }

    fn format(self) -> Option<Binary> {
        match self {
            Number::F16 => Some(F16),
            Number::Bf16 => Some(BF16),
            Number::E4m3 => Some(E4M3),
            Number::E5m2 => Some(E5M2),
            Number::Tf32 | Number::S8 | Number::U8 => None,
        }
    }

    fn integer(self) -> bool {
        matches!(self, Number::S8 | Number::U8)
    }

    /// The value that stands for `x`, a small integer: what the type has no sign for is counted from zero.
    fn value(self, x: f32) -> f32 {
        if self == Number::U8 { x + 200.0 } else { x }
    }

    fn bytes(self) -> usize {
        match self {
            Number::Tf32 => 4,
            Number::F16 | Number::Bf16 => 2,
            Number::E4m3 | Number::E5m2 | Number::S8 | Number::U8 => 1,
        }
    }

    fn encode(self, x: f32) -> Vec<u8> {
        let bits = match self.format() {
            Some(format) => format.round(x.into(), Mode::Rn).expect("an integer is a number"),
            // Small integers have no bits below those of tf32.
            None if self == Number::Tf32 => x.to_bits().into(),
            None => x as i64 as u64,
        };
        bits.to_le_bytes()[..self.bytes()].to_vec()
    }
}

/// What the instruction's text fixes.
#[derive(Clone, Copy, PartialEq)]
struct Entry {
    n: usize,
    types: Types,
    a_in_registers: bool,
    /// MN-major operands.
    transposed: (bool, bool),
    /// -1 as scale-a, scale-b.
    negated: (bool, bool),
    satfinite: bool,
}

impl Entry {
    fn name(&self) -> String {
        let flag = |on: bool, text: &'static str| if on { text } else { "" };
        format!(
            "wgmma_{}_n{}_{}_{}{}{}{}{}{}",
            if self.a_in_registers { "rs" } else { "ss" },
            self.n,
            self.types.a.name(),
            self.types.b.name(),
            flag(self.transposed.0, "_ta"),
            flag(self.transposed.1, "_tb"),
            flag(self.negated.0, "_na"),
            flag(self.negated.1, "_nb"),
            flag(self.satfinite, "_satfinite"),
        )
    }

    fn k(&self) -> usize {
        32 / self.types.a.bytes()
    }

    fn ptx(&self) -> String {
        let count = self.n / 2;
        let d = if self.types.a.integer() { "b32" } else { "f32" };
        let sign = |negative: bool| if negative { "-1" } else { "1" };
        let mut immediates =
            if self.types.a.integer() { String::new() } else { format!(", {}, {}", sign(self.negated.0), sign(self.negated.1)) };
        if self.types.a.bytes() == 2 {
            if !self.a_in_registers {
                immediates += &format!(", {}", u8::from(self.transposed.0));
            }
            immediates += &format!(", {}", u8::from(self.transposed.1));
        }
        let list = |from: usize| (from..from + 4).map(|i| format!("d{i}")).collect::<Vec<_>>().join(", ");
        let all = (0..count).map(|i| format!("d{i}")).collect::<Vec<_>>().join(", ");
        let a = if self.a_in_registers { "{a0, a1, a2, a3}" } else { "a_desc" };
        let mut text = format!(
            "\n.visible .entry {}(.param .u64 a, .param .u32 a_bytes, .param .u64 b, .param .u32 b_bytes, .param .u64 c, .param .u64 out, .param .u64 a_fields, .param .u64 b_fields, .param .u32 scale_d)\n{{\n\
             \t.reg .pred p, more;\n\t.reg .b32 i, at, end, to, w<4>, a<4>;\n\t.reg .b64 from, own, a_desc, b_desc, field;\n\t.reg .{} d<{count}>;\n",
            self.name(),
            if self.types.a.integer() { "b32" } else { "f32" }
        );
        let copy = |operand: &str, base: &str| {
            format!(
                "\tld.param.u64 from, [{operand}];\n\tld.param.u32 end, [{operand}_bytes];\n{base}\tmov.u32 i, %tid.x;\n\tshl.b32 i, i, 4;\n\
                 copy_{operand}:\n\tsetp.ge.u32 p, i, end;\n\t@p bra copied_{operand};\n\tcvt.u64.u32 own, i;\n\tadd.u64 own, own, from;\n\tld.global.v4.b32 {{w0, w1, w2, w3}}, [own];\n\
                 \tadd.u32 at, to, i;\n\tst.shared.v4.b32 [at], {{w0, w1, w2, w3}};\n\tadd.u32 i, i, 2048;\n\tbra copy_{operand};\ncopied_{operand}:\n"
            )
        };
        // A descriptor: address bits 4-17, and the fields the case gives.
        let descriptor = |name: &str| {
            format!(
                "\tand.b32 at, to, 0x3FFFF;\n\tshr.u32 at, at, 4;\n\tcvt.u64.u32 {name}_desc, at;\n\tld.param.u64 field, [{name}_fields];\n\tadd.u64 {name}_desc, {name}_desc, field;\n"
            )
        };
        if self.a_in_registers {
            text += "\tld.param.u64 from, [a];\n\tmov.u32 i, %tid.x;\n\tmad.wide.u32 own, i, 16, from;\n\tld.global.v4.b32 {a0, a1, a2, a3}, [own];\n";
            text += &copy("b", "\tmov.u32 to, tile;\n");
            text += &descriptor("b");
        } else {
            text += &copy("a", "\tmov.u32 to, tile;\n");
            text += &descriptor("a");
            text += &copy("b", "\tld.param.u32 to, [a_bytes];\n\tmov.u32 i, tile;\n\tadd.u32 to, to, i;\n");
            text += &descriptor("b");
        }
        text += "\tfence.proxy.async.shared::cta;\n\tbar.sync 0;\n";
        text += &format!("\tld.param.u64 from, [c];\n\tmov.u32 i, %tid.x;\n\tmad.wide.u32 own, i, {}, from;\n", 4 * count);
        for i in (0..count).step_by(4) {
            text += &format!("\tld.global.v4.{d} {{{}}}, [own+{}];\n", list(i), 4 * i);
        }
        text += "\tld.param.u32 i, [scale_d];\n\tsetp.ne.u32 more, i, 0;\n\twgmma.fence.sync.aligned;\n";
        text += &format!(
            "\twgmma.mma_async.sync.aligned.m64n{}k{}.{}{}.{}.{} {{{all}}}, {a}, b_desc, more{immediates};\n",
            self.n,
            self.k(),
            if self.satfinite { "satfinite." } else { "" },
            if self.types.a.integer() { "s32" } else { "f32" },
            self.types.a.name(),
            self.types.b.name()
        );
        text += "\twgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;\n";
        text += &format!("\tld.param.u64 from, [out];\n\tmov.u32 i, %tid.x;\n\tmad.wide.u32 own, i, {}, from;\n", 4 * count);
        for i in (0..count).step_by(4) {
            text += &format!("\tst.global.v4.{d} [own+{}], {{{}}};\n", 4 * i, list(i));
        }
        text + "\tret;\n}\n"
    }
}

const fn types(a: Number, b: Number) -> Types {
    Types { a, b }
}

const BOTH_BF16: Types = types(Number::Bf16, Number::Bf16);
const BOTH_F16: Types = types(Number::F16, Number::F16);
const BOTH_E4M3: Types = types(Number::E4m3, Number::E4m3);
const BOTH_E5M2: Types = types(Number::E5m2, Number::E5m2);

fn plain(n: usize, types: Types) -> Entry {
    Entry { n, types, a_in_registers: false, transposed: (false, false), negated: (false, false), satfinite: false }
}

fn entries() -> Vec<Entry> {
    let mut entries: Vec<Entry> = (1..=32).map(|i| plain(8 * i, BOTH_BF16)).collect();
    for n in [8, 24, 128, 256] {
        entries.extend([plain(n, BOTH_F16), plain(n, BOTH_E4M3), plain(n, BOTH_E5M2)]);
    }
    entries.extend([plain(64, types(Number::E4m3, Number::E5m2)), plain(64, types(Number::E5m2, Number::E4m3))]);
    for transposed in [(true, false), (false, true), (true, true)] {
        entries.extend([64, 256].map(|n| Entry { transposed, ..plain(n, BOTH_BF16) }));
        entries.push(Entry { transposed, ..plain(32, BOTH_F16) });
    }
    for entry in [plain(64, BOTH_BF16), plain(8, BOTH_F16), plain(64, BOTH_E4M3), plain(24, BOTH_E5M2), plain(256, BOTH_BF16)] {
        entries.push(Entry { a_in_registers: true, ..entry });
    }
    entries.push(Entry { a_in_registers: true, transposed: (false, true), ..plain(64, BOTH_BF16) });
    for negated in [(true, false), (false, true), (true, true)] {
        entries.push(Entry { negated, ..plain(16, BOTH_BF16) });
    }
    entries.push(Entry { negated: (true, false), a_in_registers: true, ..plain(16, BOTH_F16) });
    entries.push(Entry { negated: (false, true), ..plain(16, BOTH_E4M3) });
    let tf32 = types(Number::Tf32, Number::Tf32);
    entries.extend([8, 16, 64, 88, 256].map(|n| plain(n, tf32)));
    entries.extend([24, 64].map(|n| Entry { a_in_registers: true, ..plain(n, tf32) }));
    entries.push(Entry { negated: (true, false), ..plain(16, tf32) });
    for (a, b) in [(Number::S8, Number::S8), (Number::S8, Number::U8), (Number::U8, Number::S8), (Number::U8, Number::U8)] {
        entries.extend([plain(24, types(a, b)), Entry { a_in_registers: true, ..plain(64, types(a, b)) }]);
    }
    entries.extend([plain(8, types(Number::S8, Number::S8)), plain(256, types(Number::S8, Number::S8))]);
    entries.push(Entry { satfinite: true, ..plain(16, types(Number::S8, Number::S8)) });
    entries
}

/// How an operand lies in shared memory.
#[derive(Clone, Copy)]
struct Layout {
    swizzle: Swizzle,
    mn_major: bool,
    /// Leading and stride byte offsets of the descriptor.
    lbo: usize,
    sbo: usize,
    /// First byte of this instruction's 32 bytes of k, or of its k rows, in the picture.
    start: usize,
    /// k of the first element, in elements: what lies before `start`.
    k0: usize,
}

impl Layout {
    /// Rows of `bk` bytes of k, eight to a group; `step` counts slices of 32 bytes.
    fn k_major(swizzle: Swizzle, rows: usize, step: usize, number: Number) -> Layout {
        let k0 = step * 32 / number.bytes();
        match swizzle {
            // Core matrices of eight rows by sixteen bytes: all of the first sixteen bytes, then all of the next.
            Swizzle::None => Layout { swizzle, mn_major: false, lbo: rows * 16, sbo: 128, start: 2 * step * rows * 16, k0 },
            _ => Layout { swizzle, mn_major: false, lbo: 16, sbo: 8 * swizzle.span(), start: 32 * step, k0 },
        }
    }

    /// Panels of one span of `mn` by `k_rows`; `step` counts slices of sixteen k.
    fn mn_major(swizzle: Swizzle, mn: usize, k_rows: usize, step: usize) -> Layout {
        match swizzle {
            Swizzle::None => {
                // Core matrices of eight k by sixteen bytes of mn, k groups `mn * 16` bytes apart.
                let lbo = mn * 16;
                Layout { swizzle, mn_major: true, lbo, sbo: 128, start: 2 * step * lbo, k0: 16 * step }
            }
            _ => {
                let span = swizzle.span();
                Layout { swizzle, mn_major: true, lbo: k_rows * span, sbo: 8 * span, start: 16 * step * span, k0: 16 * step }
            }
        }
    }

    /// Byte of the picture that holds element (mn, k), for any k of the whole tile.
    fn place(&self, mn: usize, k: usize, number: Number) -> usize {
        let span = self.swizzle.span();
        let width = number.bytes();
        let plain = match (self.mn_major, self.swizzle) {
            (false, Swizzle::None) => mn / 8 * self.sbo + mn % 8 * 16 + k * width / 16 * self.lbo + k * width % 16,
            (false, _) => mn / 8 * self.sbo + mn % 8 * span + k * width,
            (true, Swizzle::None) => k / 8 * self.lbo + k % 8 * 16 + mn * width / 16 * self.sbo + mn * width % 16,
            (true, _) => k / 8 * self.sbo + k % 8 * span + mn * width % span + mn * width / span * self.lbo,
        };
        self.swizzle.apply(plain)
    }

    /// A picture of `mn` x `k` elements, and the bytes between them 0x7F, which no right answer uses.
    fn picture(&self, values: &[f32], mn: usize, k: usize, number: Number) -> Vec<u8> {
        let places = (0..mn).flat_map(|r| (0..k).map(move |c| self.place(r, c, number)));
        let size = places.max().expect("a tile has elements") + number.bytes();
        let mut bytes = vec![0x7F; size.next_multiple_of(1024)];
        for r in 0..mn {
            for c in 0..k {
                let at = self.place(r, c, number);
                bytes[at..at + number.bytes()].copy_from_slice(&number.encode(values[r * k + c]));
            }
        }
        bytes
    }

    /// What a descriptor holds beside the address of the picture.
    fn fields(&self) -> u64 {
        let code = match self.swizzle {
            Swizzle::None => 0u64,
            Swizzle::B128 => 1,
            Swizzle::B64 => 2,
            Swizzle::B32 => 3,
        };
        (self.start >> 4) as u64 | ((self.lbo >> 4) as u64) << 16 | ((self.sbo >> 4) as u64) << 32 | code << 62
    }
}

/// Row and column of accumulator `i` of a thread.
fn accumulator(thread: usize, i: usize) -> (usize, usize) {
    let (warp, lane) = (thread / 32, thread % 32);
    (16 * warp + lane / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2)
}

/// The four registers of A of a thread.
fn a_registers(a: &[f32], width: usize, k0: usize, number: Number, thread: usize) -> [u32; 4] {
    let (warp, lane) = (thread / 32, thread % 32);
    let (group, t, per) = (lane / 4, lane % 4, 4 / number.bytes());
    std::array::from_fn(|r| {
        let row = 16 * warp + group + 8 * (r % 2);
        let k = k0 + per * t + 4 * per * (r / 2);
        let bytes: Vec<u8> = (0..per).flat_map(|j| number.encode(a[row * width + k + j])).collect();
        u32::from_le_bytes(bytes.try_into().expect("four bytes"))
    })
}

/// One launch: A is 64 x ka, B is n x kb, and the instruction takes 32 bytes of k out of each.
fn case(name: String, entry: Entry, a_layout: Layout, ka: usize, b_layout: Layout, kb: usize, scale_d: bool) -> Case {
    let (n, k) = (entry.n, entry.k());
    let values =
        |count: usize, seed: u64, number: Number| scrambled(count, seed, 4).into_iter().map(|x| number.value(x)).collect::<Vec<_>>();
    let (a, b) = (values(64 * ka, 41, entry.types.a), values(n * kb, 42, entry.types.b));
    let c = scrambled(128 * n / 2, 43, 100);
    let sign = if entry.negated.0 != entry.negated.1 { -1.0 } else { 1.0 };
    let mut want = Vec::new();
    for thread in 0..128 {
        for i in 0..n / 2 {
            let (row, column) = accumulator(thread, i);
            let sum: f32 = (0..k).map(|j| a[row * ka + a_layout.k0 + j] * b[column * kb + b_layout.k0 + j]).sum();
            want.push(sign * sum + if scale_d { c[thread * n / 2 + i] } else { 0.0 } + 0.0);
        }
    }
    let a_picture = if entry.a_in_registers {
        u32s(&(0..128).flat_map(|thread| a_registers(&a, ka, a_layout.k0, entry.types.a, thread)).collect::<Vec<_>>())
    } else {
        a_layout.picture(&a, 64, ka, entry.types.a)
    };
    let b_picture = b_layout.picture(&b, n, kb, entry.types.b);
    let shared = b_picture.len() + if entry.a_in_registers { 0 } else { a_picture.len() };
    let limits = |x: f32| if x > 0.0 { i32::MAX } else { i32::MIN };
    let sums = |values: &[f32]| match (entry.types.a.integer(), entry.satfinite) {
        (false, _) => f32s(values),
        (true, false) => u32s(&values.iter().map(|&x| x as i32 as u32).collect::<Vec<_>>()),
        // At the edge of what the accumulators hold.
        (true, true) => u32s(
            &values
                .iter()
                .zip(&c)
                .map(|(&x, &c)| if scale_d { limits(c).saturating_add((x - c) as i32) } else { x as i32 } as u32)
                .collect::<Vec<_>>(),
        ),
    };
    let args = vec![
        Arg::input(a_picture.clone()),
        Arg::U32(a_picture.len() as u32),
        Arg::input(b_picture.clone()),
        Arg::U32(b_picture.len() as u32),
        Arg::input(sums(&c)),
        Arg::output(sums(&want)),
        Arg::U64(a_layout.fields()),
        Arg::U64(b_layout.fields()),
        Arg::U32(scale_d.into()),
    ];
    Case::new(name, "wgmma", entry.name(), 128, args).shared(shared as u32)
}

fn cases() -> Vec<Case> {
    use Swizzle::{B32, B64, B128};
    let mut cases = Vec::new();
    let all = [Swizzle::None, B32, B64, B128];
    for entry in entries() {
        let (number, k) = (entry.types.a, entry.k());
        // The whole tile is one span of k wide, or one instruction wide without swizzle.
        let width = |swizzle: Swizzle| if swizzle == Swizzle::None { 2 * k } else { swizzle.span() / number.bytes() };
        let is_variant = entry.transposed != (false, false) || entry.a_in_registers;
        let swizzles: &[Swizzle] = if is_variant || entry.n == 64 { &all } else { &[B128] };
        for &a_swizzle in swizzles {
            for &b_swizzle in swizzles {
                // Both swizzles vary together, and against each other for the entries with 64 columns.
                if a_swizzle != b_swizzle && (entry.n != 64 || entry.a_in_registers) {
                    continue;
                }
                let steps = if a_swizzle == b_swizzle { width(a_swizzle) / k } else { 1 };
                for step in 0..steps {
                    let (ka, a_layout) = if entry.transposed.0 {
                        (64, Layout::mn_major(a_swizzle, 64, 64, step))
                    } else {
                        (width(a_swizzle), Layout::k_major(a_swizzle, 64, step, number))
                    };
                    let (kb, b_layout) = if entry.transposed.1 {
                        (64, Layout::mn_major(b_swizzle, entry.n, 64, step))
                    } else {
                        (width(b_swizzle), Layout::k_major(b_swizzle, entry.n, step, number))
                    };
                    let scale_d = step % 2 == 0;
                    let name = format!("{} A {a_swizzle:?} B {b_swizzle:?} step {step} scale-d {scale_d}", entry.name());
                    cases.push(case(name, entry, a_layout, ka, b_layout, kb, scale_d));
                }
            }
        }
    }
    // The base offset of a descriptor (bits 49-51) has no meaning without a swizzle.
    for transposed in [(false, false), (false, true)] {
        let entry = Entry { transposed, ..plain(64, BOTH_BF16) };
        let a = Layout::k_major(Swizzle::None, 64, 0, Number::Bf16);
        let (kb, b) = if transposed.1 {
            (64, Layout::mn_major(Swizzle::None, 64, 64, 0))
        } else {
            (32, Layout::k_major(Swizzle::None, 64, 0, Number::Bf16))
        };
        let mut case = case(format!("{} without swizzle, base offset 5", entry.name()), entry, a, 32, b, kb, true);
        for arg in &mut case.args {
            if let Arg::U64(fields) = arg {
                *fields |= 5 << 49;
            }
        }
        cases.push(case);
    }
    cases
}
