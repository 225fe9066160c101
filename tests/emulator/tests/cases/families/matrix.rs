//! Warp-level matrices: mma.sync, ldmatrix, stmatrix.

use super::super::elementwise::{Op, Ty, cases, image};
use super::super::number::{BF16, Binary, E4M3, F16, Mode};
use super::super::{Arg, Case, scrambled, u32s};
use super::Family;

pub fn family() -> Family {
    let moves = moves();
    let mut all = cases("matrix", &moves);
    let mut text = image("Warp-level matrices: mma.sync, ldmatrix, stmatrix.", &moves);
    for shape in SHAPES {
        text += &shape.ptx();
        all.push(shape.case());
    }
    for (rows, k) in [(8, 4), (16, 4), (16, 8), (16, 16)] {
        text += &double(rows, k);
        all.push(double_case(rows, k));
    }
    Family::table("matrix", text, all)
}

// Products -------------------------------------------------------------------------------------------------

/// How an element is written into a register.
#[derive(Clone, Copy)]
enum Number {
    Float(Binary),
    /// The top 19 bits of an f32.
    Tf32,
    S8,
    U8,
}

impl Number {
    fn bytes(self) -> usize {
        match self {
            Number::Tf32 => 4,
            Number::Float(format) if format.exponent_bits + format.mantissa_bits > 8 => 2,
            _ => 1,
        }
    }

    fn encode(self, x: f32) -> Vec<u8> {
        let bits = match self {
            Number::Float(format) => format.round(x.into(), Mode::Rn).expect("an integer is a number"),
            Number::Tf32 => x.to_bits().into(),
            Number::S8 | Number::U8 => x as i64 as u64,
        };
        bits.to_le_bytes()[..self.bytes()].to_vec()
    }
}

/// What the accumulators are.
#[derive(Clone, Copy, PartialEq)]
enum Sum {
    F32,
    F16,
    S32,
}

struct Shape {
    /// Everything behind `mma.sync.aligned.m16n8`.
    text: &'static str,
    entry: &'static str,
    k: usize,
    a: Number,
    b: Number,
    sum: Sum,
}

const SHAPES: [Shape; 11] = [
    Shape {
        text: "k16.row.col.f32.bf16.bf16.f32",
        entry: "mma_k16_bf16",
        k: 16,
        a: Number::Float(BF16),
        b: Number::Float(BF16),
        sum: Sum::F32,
    },
    Shape {
        text: "k8.row.col.f32.bf16.bf16.f32",
        entry: "mma_k8_bf16",
        k: 8,
        a: Number::Float(BF16),
        b: Number::Float(BF16),
        sum: Sum::F32,
    },
    Shape { text: "k16.row.col.f32.f16.f16.f32", entry: "mma_k16_f16", k: 16, a: Number::Float(F16), b: Number::Float(F16), sum: Sum::F32 },
    Shape { text: "k8.row.col.f32.f16.f16.f32", entry: "mma_k8_f16", k: 8, a: Number::Float(F16), b: Number::Float(F16), sum: Sum::F32 },
    Shape {
        text: "k16.row.col.f16.f16.f16.f16",
        entry: "mma_k16_f16_to_f16",
        k: 16,
        a: Number::Float(F16),
        b: Number::Float(F16),
        sum: Sum::F16,
    },
    Shape { text: "k8.row.col.f32.tf32.tf32.f32", entry: "mma_k8_tf32", k: 8, a: Number::Tf32, b: Number::Tf32, sum: Sum::F32 },
    Shape { text: "k4.row.col.f32.tf32.tf32.f32", entry: "mma_k4_tf32", k: 4, a: Number::Tf32, b: Number::Tf32, sum: Sum::F32 },
    Shape {
        text: "k32.row.col.f32.e4m3.e4m3.f32",
        entry: "mma_k32_e4m3",
        k: 32,
        a: Number::Float(E4M3),
        b: Number::Float(E4M3),
        sum: Sum::F32,
    },
    Shape { text: "k32.row.col.s32.s8.s8.s32", entry: "mma_k32_s8", k: 32, a: Number::S8, b: Number::S8, sum: Sum::S32 },
    Shape { text: "k32.row.col.s32.u8.s8.s32", entry: "mma_k32_u8_s8", k: 32, a: Number::U8, b: Number::S8, sum: Sum::S32 },
    Shape { text: "k16.row.col.s32.s8.s8.s32", entry: "mma_k16_s8", k: 16, a: Number::S8, b: Number::S8, sum: Sum::S32 },
];

impl Shape {
    /// Elements of one register.
    fn per(&self) -> usize {
        4 / self.a.bytes()
    }

    /// Registers of A, B and the accumulators.
    fn registers(&self) -> (usize, usize, usize) {
        let b = self.k / (4 * self.per());
        (2 * b, b, if self.sum == Sum::F16 { 2 } else { 4 })
    }

    fn ptx(&self) -> String {
        let (a, b, c) = self.registers();
        let class = if self.sum == Sum::F32 { "f32" } else { "b32" };
        let list = |name: &str, count: usize| (0..count).map(|i| format!("{name}{i}")).collect::<Vec<_>>().join(", ");
        let mut text = format!(
            "\n.visible .entry {}(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d)\n{{\n\t.reg .b32 i, a<{a}>, b<{b}>;\n\t.reg .{class} c<{c}>, d<{c}>;\n\t.reg .b64 at;\n\tmov.u32 i, %tid.x;\n",
            self.entry
        );
        for (name, count, class) in [("a", a, "b32"), ("b", b, "b32"), ("c", c, class)] {
            text += &format!("\tld.param.u64 at, [{name}];\n\tmad.wide.u32 at, i, {}, at;\n", 4 * count);
            for r in 0..count {
                text += &format!("\tld.global.{class} {name}{r}, [at+{}];\n", 4 * r);
            }
        }
        text += &format!(
            "\tmma.sync.aligned.m16n8{} {{{}}}, {{{}}}, {{{}}}, {{{}}};\n\tld.param.u64 at, [d];\n\tmad.wide.u32 at, i, {}, at;\n",
            self.text,
            list("d", c),
            list("a", a),
            list("b", b),
            list("c", c),
            4 * c
        );
        for r in 0..c {
            text += &format!("\tst.global.{class} [at+{}], d{r};\n", 4 * r);
        }
        text + "\tret;\n}\n"
    }

    /// The registers of a fragment: register r of a lane holds `per` neighbours in k of one row (or column).
    fn fragment(&self, values: &[f32], number: Number, rows_of_a: bool) -> Vec<u32> {
        let per = self.per();
        let (a, b, _) = self.registers();
        let mut words = Vec::new();
        for lane in 0..32 {
            let (group, t) = (lane / 4, lane % 4);
            for r in 0..if rows_of_a { a } else { b } {
                let (row, block) = if rows_of_a { (group + 8 * (r % 2), r / 2) } else { (group, r) };
                let k = 4 * per * block + per * t;
                let bytes: Vec<u8> = (k..k + per).flat_map(|k| number.encode(values[row * self.k + k])).collect();
                words.push(u32::from_le_bytes(bytes.try_into().expect("a register")));
            }
        }
        words
    }

    /// Accumulators in the order of registers: rows g and g + 8, columns 2t and 2t + 1.
    fn accumulators(&self, values: &[f32]) -> Vec<u8> {
        let mut out = Vec::new();
        for lane in 0..32 {
            for i in 0..4 {
                let (row, column) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
                let x = values[row * 8 + column];
                out.extend(match self.sum {
                    Sum::F32 => x.to_le_bytes().to_vec(),
                    Sum::S32 => (x as i32).to_le_bytes().to_vec(),
                    Sum::F16 => Number::Float(F16).encode(x),
                });
            }
        }
        out
    }

    fn case(&self) -> Case {
        let mut a = scrambled(16 * self.k, 51, 4);
        if matches!(self.a, Number::U8) {
            a.iter_mut().for_each(|x| *x = x.abs() + 200.0);
        }
        let (b, c) = (scrambled(8 * self.k, 52, 4), scrambled(16 * 8, 53, 50));
        let product = |row: usize, column: usize| -> f32 { (0..self.k).map(|k| a[row * self.k + k] * b[column * self.k + k]).sum() };
        let d: Vec<f32> = (0..128).map(|i| c[i] + product(i / 8, i % 8)).collect();
        let args = vec![
            Arg::input(u32s(&self.fragment(&a, self.a, true))),
            Arg::input(u32s(&self.fragment(&b, self.b, false))),
            Arg::input(self.accumulators(&c)),
            Arg::output(self.accumulators(&d)),
        ];
        Case::new(self.entry, "matrix", self.entry, 32, args)
    }
}

/// f64 operands: registers of A, B and the accumulators.
fn double_registers(rows: usize, k: usize) -> (usize, usize, usize) {
    (rows * k / 32, k / 4, rows / 4)
}

fn double(rows: usize, k: usize) -> String {
    let (a, b, c) = double_registers(rows, k);
    let list = |name: &str, count: usize| (0..count).map(|i| format!("{name}{i}")).collect::<Vec<_>>().join(", ");
    let mut text = format!(
        "\n.visible .entry mma_m{rows}_k{k}_f64(.param .u64 a, .param .u64 b, .param .u64 c, .param .u64 d)\n{{\n\t.reg .b32 i;\n\t.reg .f64 a<{a}>, b<{b}>, c<{c}>, d<{c}>;\n\t.reg .b64 at;\n\tmov.u32 i, %tid.x;\n"
    );
    for (name, count) in [("a", a), ("b", b), ("c", c)] {
        text += &format!("\tld.param.u64 at, [{name}];\n\tmad.wide.u32 at, i, {}, at;\n", 8 * count);
        for r in 0..count {
            text += &format!("\tld.global.f64 {name}{r}, [at+{}];\n", 8 * r);
        }
    }
    text += &format!(
        "\tmma.sync.aligned.m{rows}n8k{k}.row.col.f64.f64.f64.f64 {{{}}}, {{{}}}, {{{}}}, {{{}}};\n\tld.param.u64 at, [d];\n\tmad.wide.u32 at, i, {}, at;\n",
        list("d", c),
        list("a", a),
        list("b", b),
        list("c", c),
        8 * c
    );
    for r in 0..c {
        text += &format!("\tst.global.f64 [at+{}], d{r};\n", 8 * r);
    }
    text + "\tret;\n}\n"
}

fn double_case(rows: usize, k: usize) -> Case {
    let (a_count, b_count, c_count) = double_registers(rows, k);
    let (a, b, c) = (scrambled(rows * k, 54, 1000), scrambled(8 * k, 55, 1000), scrambled(rows * 8, 56, 1000));
    // Register r of a lane, for each lane and each of `count` registers.
    let registers = |count: usize, value: &dyn Fn(usize, usize, usize) -> f64| -> Vec<u8> {
        let each = (0..32).flat_map(|lane| (0..count).map(move |r| (lane / 4, lane % 4, r)));
        each.flat_map(|(group, t, r)| value(group, t, r).to_le_bytes()).collect()
    };
    let of_a = |group: usize, t: usize, r: usize| {
        let (low, block) = if rows == 8 { (0, r) } else { (8 * (r % 2), r / 2) };
        f64::from(a[(group + low) * k + t + 4 * block])
    };
    let place = |group: usize, t: usize, r: usize| (group + 8 * (r / 2), 2 * t + r % 2);
    let sum = |row: usize, column: usize| {
        f64::from(c[row * 8 + column]) + (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(b[column * k + i])).sum::<f64>()
    };
    let args = vec![
        Arg::input(registers(a_count, &of_a)),
        Arg::input(registers(b_count, &|group, t, r| f64::from(b[group * k + t + 4 * r]))),
        Arg::input(registers(c_count, &|group, t, r| {
            let (row, column) = place(group, t, r);
            f64::from(c[row * 8 + column])
        })),
        Arg::output(registers(c_count, &|group, t, r| {
            let (row, column) = place(group, t, r);
            sum(row, column)
        })),
    ];
    let entry = format!("mma_m{rows}_k{k}_f64");
    Case::new(entry.clone(), "matrix", entry, 32, args)
}

// Moves ----------------------------------------------------------------------------------------------------

/// Each lane writes sixteen bytes, the eight 16-bit numbers 8 * lane .. 8 * lane + 7, and points at the row of `lane ^ flip`.
fn rows(flip: usize) -> String {
    format!(
        ".shared .align 16 .b8 rows[1024];\n.reg .b32 at, base, w<4>, r<4>, lane;\nmov.u32 base, rows;\nand.b32 lane, %i, 31;\nshr.u32 at, %i, 5;\nmad.lo.u32 base, at, 512, base;\nmad.lo.u32 at, lane, 16, base;\n\
         mul.lo.u32 w0, lane, 0x80008;\nadd.u32 w0, w0, 0x10000;\nadd.u32 w1, w0, 0x20002;\nadd.u32 w2, w1, 0x20002;\nadd.u32 w3, w2, 0x20002;\nst.shared.v4.b32 [at], {{w0, w1, w2, w3}};\nbar.sync 0;\n\
         xor.b32 at, lane, {flip};\nmad.lo.u32 at, at, 16, base;\n"
    )
}

/// Pair of 16-bit numbers as a register holds it.
fn pair(low: usize, high: usize) -> u64 {
    (low | high << 16) as u64
}

/// What lane `lane` gets of a matrix whose row r starts with the number `first(r)`.
fn element(lane: usize, transposed: bool, first: impl Fn(usize) -> usize) -> u64 {
    let (group, t) = (lane / 4, lane % 4);
    if transposed { pair(first(2 * t) + group, first(2 * t + 1) + group) } else { pair(first(group) + 2 * t, first(group) + 2 * t + 1) }
}

fn moves() -> Vec<Op> {
    let none = || (0..64).map(|i| [i]).collect::<Vec<[u64; 1]>>();
    let mut ops = Vec::new();
    for (count, flip) in [(1usize, 5usize), (2, 9), (4, 21)] {
        for trans in [false, true] {
            let registers = (0..count).map(|i| format!("r{i}")).collect::<Vec<_>>().join(", ");
            let trans_text = if trans { ".trans" } else { "" };
            for register in 0..count {
                // Row r of matrix m is the one that lane 8m + r points at.
                ops.push(Op::across(
                    &format!("ldmatrix x{count}{trans_text} register {register}"),
                    &format!(
                        "{}ldmatrix.sync.aligned.m8n8.x{count}{trans_text}.shared.b16 {{{registers}}}, [at];\nmov.b32 %d, r{register};",
                        rows(flip)
                    ),
                    [Ty::B32],
                    Ty::B32,
                    none(),
                    move |_, i| element(i % 32, trans, |r| ((8 * register + r) ^ flip) * 8),
                ));
            }
            let fill: String =
                (0..count).map(|i| format!("mad.lo.u32 r{i}, lane, 0x20002, {:#x};\n", 0x1_0000 + 64 * i * 0x1_0001)).collect();
            for word in [0usize, 3] {
                // Registers hold pairs 2 * lane + 64m, + 1; what lies in word `word` of this lane's row afterwards.
                ops.push(Op::across(
                    &format!("stmatrix x{count}{trans_text} word {word}"),
                    &format!(
                        "{}{fill}bar.sync 0;\nstmatrix.sync.aligned.m8n8.x{count}{trans_text}.shared.b16 [at], {{{registers}}};\nbar.sync 0;\nmad.lo.u32 at, lane, 16, base;\nld.shared.b32 %d, [at+{}];",
                        rows(flip),
                        4 * word
                    ),
                    [Ty::B32],
                    Ty::B32,
                    none(),
                    move |_, i| {
                        let lane = i % 32;
                        let pointed = lane ^ flip; // the lane that points at this row
                        let (matrix, row) = (pointed / 8, pointed % 8);
                        if matrix >= count {
                            return pair(8 * lane + 2 * word, 8 * lane + 2 * word + 1); // as `rows` left it
                        }
                        // Element (row, column) of a matrix is held by lane 4 * row + column / 2, or with trans by 4 * column + row / 2.
                        let held = |column: usize| {
                            let (r, c) = if trans { (column, row) } else { (row, column) };
                            2 * (4 * r + c / 2) + 64 * matrix + c % 2
                        };
                        pair(held(2 * word), held(2 * word + 1))
                    },
                ));
            }
        }
    }
    ops
}
