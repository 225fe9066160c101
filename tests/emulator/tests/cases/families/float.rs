//! f32 and f64 arithmetic: every rounding mode, flush to zero, saturation, NaN rules, comparisons, approximate functions.

use super::super::Want;
use super::super::elementwise::{Op, Ty, Value, binary, cases, image, ternary, unary};
use super::super::number::{F32, Mode, add_odd, div_odd, fma_odd, sqrt_odd};
use super::Family;

pub fn family() -> Family {
    let mut ops = arithmetic32();
    ops.extend(flushed_and_saturated());
    ops.extend(arithmetic64());
    ops.extend(extremes());
    ops.extend(comparisons());
    ops.extend(approximations());
    Family::table("float", image("f32 and f64 arithmetic, comparisons and approximate functions.", &ops), cases("float", &ops))
}

const MODES: [(&str, Mode); 4] = [("rn", Mode::Rn), ("rz", Mode::Rz), ("rm", Mode::Rm), ("rp", Mode::Rp)];

/// The f32 nearest to an exact result in `mode`.
fn rounded(exact: f64, mode: Mode) -> Want {
    F32.round(exact, mode).map_or(Want::Nan, Want::Bits)
}

fn wide(bits: u64) -> f64 {
    f64::from(f32::from_bits(bits as u32))
}

/// An exact sum of zero is -0 only towards minus infinity, unless both terms are -0.
fn sum(a: f64, b: f64, mode: Mode) -> f64 {
    let exact = add_odd(a, b);
    let cancelled = exact == 0.0 && !(a == 0.0 && b == 0.0 && a.is_sign_negative() == b.is_sign_negative());
    if cancelled && mode == Mode::Rm { -0.0 } else { exact }
}

fn fma(a: f64, b: f64, c: f64, mode: Mode) -> f64 {
    let exact = fma_odd(a, b, c);
    if exact == 0.0 { sum(a * b, c, mode) } else { exact }
}

fn arithmetic32() -> Vec<Op> {
    let mut ops = vec![
        binary("add.f32", |a: f32, b: f32| a + b),
        binary("mul.f32", |a: f32, b: f32| a * b),
        unary("neg.f32", |a: f32| -a),
        unary("abs.f32", f32::abs),
        binary("copysign.f32", |a: f32, b: f32| b.copysign(a))
            .values(&[&[0, 0x8000_0000, 0x3F80_0000, 0xFF80_0000], &[0x4000_0000, 0xC000_0000, 0, 0x7F80_0000]]),
        unary("testp", |a: f32| u32::from(a.is_finite())).body("testp.finite.f32", &testp("finite")),
        unary("testp", |a: f32| u32::from(a.is_subnormal())).body("testp.subnormal.f32", &testp("subnormal")),
        unary("testp", |a: f32| u32::from(a.is_nan())).body("testp.notanumber.f32", &testp("notanumber")),
        unary("testp", |a: f32| u32::from(a.is_infinite())).body("testp.infinite.f32", &testp("infinite")),
        unary("testp", |a: f32| u32::from(a.is_normal() || a == 0.0)).body("testp.normal.f32", &testp("normal")),
    ];
    for (name, mode) in MODES {
        ops.push(Op::new(&format!("add.{name}.f32"), &[Ty::F32; 2], Ty::F32, move |x| rounded(sum(wide(x[0]), wide(x[1]), mode), mode)));
        ops.push(Op::new(&format!("sub.{name}.f32"), &[Ty::F32; 2], Ty::F32, move |x| rounded(sum(wide(x[0]), -wide(x[1]), mode), mode)));
        ops.push(Op::new(&format!("mul.{name}.f32"), &[Ty::F32; 2], Ty::F32, move |x| rounded(wide(x[0]) * wide(x[1]), mode)));
        ops.push(Op::new(&format!("fma.{name}.f32"), &[Ty::F32; 3], Ty::F32, move |x| {
            rounded(fma(wide(x[0]), wide(x[1]), wide(x[2]), mode), mode)
        }));
        ops.push(Op::new(&format!("div.{name}.f32"), &[Ty::F32; 2], Ty::F32, move |x| rounded(div_odd(wide(x[0]), wide(x[1])), mode)));
        ops.push(Op::new(&format!("rcp.{name}.f32"), &[Ty::F32], Ty::F32, move |x| rounded(div_odd(1.0, wide(x[0])), mode)));
        ops.push(Op::new(&format!("sqrt.{name}.f32"), &[Ty::F32], Ty::F32, move |x| rounded(sqrt_odd(wide(x[0])), mode)));
    }
    ops
}

fn testp(what: &str) -> String {
    format!(".reg .pred p;\ntestp.{what}.f32 p, %a;\nselp.u32 %d, 1, 0, p;")
}

/// A subnormal becomes zero of its sign.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// To [0, 1]; NaN becomes zero. The ISA does not say which zero a negative zero becomes, so either is right.
fn saturated(name: &str, arity: usize, f: fn(&[f32]) -> f32) -> Op {
    Op::new(name, &vec![Ty::F32; arity], Ty::F32, move |x| {
        let result = f(&x.iter().map(|&bits| f32::from_bits(bits as u32)).collect::<Vec<_>>());
        if result > 0.0 { result.min(1.0).want() } else { Want::Near { value: 0.0, relative: 0.0, absolute: 0.0 } }
    })
}

fn flushed_and_saturated() -> Vec<Op> {
    vec![
        binary("add.ftz.f32", |a: f32, b: f32| flush(flush(a) + flush(b))),
        binary("sub.rn.ftz.f32", |a: f32, b: f32| flush(flush(a) - flush(b))),
        binary("mul.ftz.f32", |a: f32, b: f32| flush(flush(a) * flush(b))).values(&[PLAIN, TINY]),
        ternary("fma.rn.ftz.f32", |a: f32, b: f32, c: f32| flush(flush(a).mul_add(flush(b), flush(c)))).values(&[PLAIN, TINY, TINY]),
        saturated("add.sat.f32", 2, |x| x[0] + x[1]),
        saturated("mul.sat.f32", 2, |x| x[0] * x[1]),
        saturated("sub.ftz.sat.f32", 2, |x| flush(flush(x[0]) - flush(x[1]))),
        saturated("fma.rn.sat.f32", 3, |x| x[0].mul_add(x[1], x[2])),
        unary("neg.ftz.f32", |a: f32| -flush(a)),
        unary("abs.ftz.f32", |a: f32| flush(a).abs()),
    ]
}

/// Inputs whose products with each other lie clear of the boundary between normal and subnormal, where the point of
/// flushing (before or after rounding) would matter.
const PLAIN: &[u64] = &[0, 0x8000_0000, 0x3F80_0000, 0xC020_0000, 0x3F00_0000, 0x7F80_0000, 0x7FC0_0000, 0x0000_0001];
const TINY: &[u64] = &[0, 1, 0x8000_0001, 0x007F_FFFF, 0x0080_0000, 0x8080_0000, 0x0100_0000, 0x3F80_0000, 0x4049_0FDB];

fn arithmetic64() -> Vec<Op> {
    // Directed rounding of an f64 from the nearest result and the sign of what it lost.
    fn directed(nearest: f64, lost: f64, mode: Mode) -> f64 {
        if lost == 0.0 || !nearest.is_finite() {
            return nearest;
        }
        match mode {
            Mode::Rz if (lost > 0.0) != (nearest > 0.0) => {
                if nearest > 0.0 {
                    nearest.next_down()
                } else {
                    nearest.next_up()
                }
            }
            Mode::Rm if lost < 0.0 => nearest.next_down(),
            Mode::Rp if lost > 0.0 => nearest.next_up(),
            _ => nearest,
        }
    }
    const MODERATE: &[f64] = &[0.5, 1.0, -1.0, 1.0 + f64::EPSILON, -2.5, std::f64::consts::PI, 1e-20, -1e10, 0.1, -0.3, 7.0, 1e15 + 0.3];
    let moderate: Vec<u64> = MODERATE.iter().map(|x| x.to_bits()).collect();
    let mut ops = vec![
        binary("add.f64", |a: f64, b: f64| a + b),
        binary("sub.f64", |a: f64, b: f64| a - b),
        binary("mul.f64", |a: f64, b: f64| a * b),
        ternary("fma.rn.f64", f64::mul_add),
        binary("div.rn.f64", |a: f64, b: f64| a / b),
        unary("rcp.rn.f64", |a: f64| 1.0 / a),
        unary("sqrt.rn.f64", f64::sqrt),
        unary("neg.f64", |a: f64| -a),
        unary("abs.f64", f64::abs),
    ];
    for (name, mode) in &MODES[1..] {
        let mode = *mode;
        let two: [&[u64]; 2] = [&moderate, &moderate];
        ops.push(
            Op::new(&format!("add.{name}.f64"), &[Ty::F64; 2], Ty::F64, move |x| {
                let (a, b) = (f64::from_bits(x[0]), f64::from_bits(x[1]));
                let sum = a + b;
                let b_part = sum - a;
                let lost = (a - (sum - b_part)) + (b - b_part);
                if sum == 0.0 && mode == Mode::Rm { (-0.0f64).want() } else { directed(sum, lost, mode).want() }
            })
            .values(&two),
        );
        ops.push(
            Op::new(&format!("mul.{name}.f64"), &[Ty::F64; 2], Ty::F64, move |x| {
                let (a, b) = (f64::from_bits(x[0]), f64::from_bits(x[1]));
                directed(a * b, a.mul_add(b, -(a * b)), mode).want()
            })
            .values(&two),
        );
        ops.push(
            Op::new(&format!("div.{name}.f64"), &[Ty::F64; 2], Ty::F64, move |x| {
                let (a, b) = (f64::from_bits(x[0]), f64::from_bits(x[1]));
                let remainder = (-(a / b)).mul_add(b, a);
                directed(a / b, if b < 0.0 { -remainder } else { remainder }, mode).want()
            })
            .values(&two),
        );
    }
    ops
}

/// min and max order -0 below +0 and, of a number and a NaN, give the number.
fn min(a: f32, b: f32) -> f32 {
    if a.is_nan() || (b < a) || (a == b && b.is_sign_negative()) { b } else { a }
}

fn max(a: f32, b: f32) -> f32 {
    if a.is_nan() || (b > a) || (a == b && a.is_sign_negative()) { b } else { a }
}

fn nan_wins(a: f32, b: f32, otherwise: f32) -> f32 {
    if a.is_nan() || b.is_nan() { f32::NAN } else { otherwise }
}

/// The magnitude that `choose` picks with the product of both signs.
fn xor_sign(a: f32, b: f32, choose: fn(f32, f32) -> f32) -> f32 {
    let negative = a.is_sign_negative() != b.is_sign_negative();
    choose(a.abs(), b.abs()).copysign(if negative { -1.0 } else { 1.0 })
}

fn extremes() -> Vec<Op> {
    vec![
        binary("min.f32", min),
        binary("max.f32", max),
        binary("min.ftz.f32", |a: f32, b: f32| min(flush(a), flush(b))),
        binary("max.NaN.f32", |a: f32, b: f32| nan_wins(a, b, max(a, b))),
        binary("min.NaN.f32", |a: f32, b: f32| nan_wins(a, b, min(a, b))),
        binary("min.xorsign.abs.f32", |a: f32, b: f32| xor_sign(a, b, min)),
        binary("max.xorsign.abs.f32", |a: f32, b: f32| xor_sign(a, b, max)),
        binary("min.f64", |a: f64, b: f64| if a.is_nan() || b < a || (a == b && b.is_sign_negative()) { b } else { a }),
        binary("max.f64", |a: f64, b: f64| if a.is_nan() || b > a || (a == b && a.is_sign_negative()) { b } else { a }),
        // Where the ISA fixes the payload: both inputs NaN, or one with .NaN, give the canonical NaN.
        binary("canonical", |_: f32, _: f32| 0x7FFF_FFFFu32)
            .values(&[&[0x7F80_0001, 0xFFC0_1234], &[0x7FC0_0000, 0xFFFF_FFFF]])
            .body("min.f32 of two NaN", ".reg .f32 m;\nmin.f32 m, %a, %b;\nmov.b32 %d, m;"),
        binary("canonical", |_: f32, _: f32| 0x7FFF_FFFFu32)
            .values(&[&[0x7F80_0001, 0xFFC0_1234], &[0x3F80_0000, 0xFFFF_FFFF]])
            .body("max.NaN.f32 of a NaN", ".reg .f32 m;\nmax.NaN.f32 m, %a, %b;\nmov.b32 %d, m;"),
    ]
}

fn comparisons() -> Vec<Op> {
    let tests: [(&str, fn(f64, f64) -> bool); 14] = [
        ("eq", |a, b| a == b),
        ("ne", |a, b| !unordered(a, b) && a != b),
        ("lt", |a, b| a < b),
        ("le", |a, b| a <= b),
        ("gt", |a, b| a > b),
        ("ge", |a, b| a >= b),
        ("equ", |a, b| a == b || unordered(a, b)),
        ("neu", |a, b| a != b),
        ("ltu", |a, b| a < b || unordered(a, b)),
        ("leu", |a, b| a <= b || unordered(a, b)),
        ("gtu", |a, b| a > b || unordered(a, b)),
        ("geu", |a, b| a >= b || unordered(a, b)),
        ("num", |a, b| !unordered(a, b)),
        ("nan", unordered),
    ];
    let mut ops = Vec::new();
    for (name, holds) in tests {
        for ty in ["f32", "f64"] {
            let code = if ty == "f32" { Ty::F32 } else { Ty::F64 };
            let read: fn(u64) -> f64 = if ty == "f32" { wide } else { f64::from_bits };
            ops.push(
                Op::new("", &[code; 2], Ty::B32, move |x| u32::from(holds(read(x[0]), read(x[1]))).want())
                    .body(&format!("setp.{name}.{ty}"), &format!(".reg .pred p;\nsetp.{name}.{ty} p, %a, %b;\nselp.u32 %d, 1, 0, p;")),
            );
        }
    }
    ops.push(
        binary("setp.lt.ftz.f32", |a: f32, b: f32| u32::from(flush(a) < flush(b)))
            .body("setp.lt.ftz.f32", ".reg .pred p;\nsetp.lt.ftz.f32 p, %a, %b;\nselp.u32 %d, 1, 0, p;"),
    );
    ops.push(binary("set.gtu.u32.f32", |a: f32, b: f32| if a <= b { 0 } else { u32::MAX }));
    ops.push(binary("set.eq.f32.f32", |a: f32, b: f32| if a == b { 1.0f32 } else { 0.0 }));
    ops
}

fn unordered(a: f64, b: f64) -> bool {
    a.is_nan() || b.is_nan()
}

/// Approximate functions, each with the bound the ISA gives for it (relative, or absolute where it says so).
fn approximations() -> Vec<Op> {
    let approximate = |name: &str, relative: f64, absolute: f64, flushes: bool, f: fn(f64) -> f64| {
        Op::new(name, &[Ty::F32], Ty::F32, move |x| {
            let a = f32::from_bits(x[0] as u32);
            // Through f32, so that overflow is infinite and underflow zero.
            let value = f(f64::from(if flushes { flush(a) } else { a })) as f32;
            Want::Near { value: f64::from(if flushes { flush(value) } else { value }), relative, absolute }
        })
    };
    let floats = |values: &[f32]| values.iter().map(|x| u64::from(x.to_bits())).collect::<Vec<_>>();
    let angles = floats(&[0.0, -0.0, 0.1, -0.5, 1.0, std::f32::consts::FRAC_PI_2, -2.0, 3.0, -3.1]);
    let exponents = floats(&[
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        10.25,
        -20.75,
        126.5,
        -125.9,
        128.0,
        200.0,
        -200.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ]);
    let positive = floats(&[1.0, 2.0, 0.5, 3.0, 0.1, 1e10, 1e-10, 1e30, 1e-30, 0.0, f32::INFINITY, f32::NAN, -1.0, 0.75, 1.25]);
    let square_root_bound = 2f64.powi(-22);
    let mut ops = vec![
        approximate("rcp.approx.ftz.f32", 2f64.powi(-23), 0.0, true, |a| 1.0 / a).values(&[&positive]),
        approximate("rcp.approx.f32", 2f64.powi(-23), 0.0, false, |a| 1.0 / a).values(&[&positive]),
        approximate("sqrt.approx.ftz.f32", square_root_bound, 0.0, true, f64::sqrt).values(&[&positive]),
        approximate("sqrt.approx.f32", square_root_bound, 0.0, false, f64::sqrt).values(&[&positive]),
        approximate("rsqrt.approx.f32", 2f64.powf(-22.4), 0.0, false, |a| 1.0 / a.sqrt()).values(&[&positive]),
        approximate("rsqrt.approx.ftz.f32", 2f64.powf(-22.4), 0.0, true, |a| 1.0 / a.sqrt()).values(&[&positive]),
        approximate("ex2.approx.ftz.f32", 2f64.powi(-22), 0.0, true, f64::exp2).values(&[&exponents]),
        approximate("ex2.approx.f32", 2f64.powi(-22), 0.0, false, f64::exp2).values(&[&exponents]),
        approximate("lg2.approx.ftz.f32", 2f64.powi(-22), 2f64.powi(-22), true, f64::log2).values(&[&positive]),
        approximate("lg2.approx.f32", 2f64.powi(-22), 2f64.powi(-22), false, f64::log2).values(&[&positive]),
        approximate("sin.approx.f32", 0.0, 2f64.powf(-20.5), false, f64::sin).values(&[&angles]),
        approximate("cos.approx.ftz.f32", 0.0, 2f64.powf(-20.5), true, f64::cos).values(&[&angles]),
        approximate("tanh.approx.f32", 2f64.powi(-11), 0.0, false, f64::tanh).values(&[&exponents]),
    ];
    // Gross approximations that the compiler refines: about twenty bits.
    let wide_positive: Vec<u64> = [1.0f64, 2.0, 0.5, 3.0, 0.1, 1e100, 1e-100, f64::INFINITY].iter().map(|x| x.to_bits()).collect();
    for (name, f) in [
        ("rcp.approx.ftz.f64", (|a| 1.0 / a) as fn(f64) -> f64),
        ("rsqrt.approx.ftz.f64", |a| 1.0 / a.sqrt()),
        ("rsqrt.approx.f64", |a| 1.0 / a.sqrt()),
    ] {
        ops.push(
            Op::new(name, &[Ty::F64], Ty::F64, move |x| Want::Near {
                value: f(f64::from_bits(x[0])),
                relative: 2f64.powi(-19),
                absolute: 0.0,
            })
            .values(&[&wide_positive]),
        );
    }
    for (name, bound) in [("div.approx.f32", 2f64.powi(-22)), ("div.full.f32", 2f64.powi(-22))] {
        ops.push(
            Op::new(name, &[Ty::F32; 2], Ty::F32, move |x| Want::Near { value: wide(x[0]) / wide(x[1]), relative: bound, absolute: 0.0 })
                .values(&[&floats(&[1.0, -2.5, 1e10, 3.0, 0.1]), &floats(&[1.0, 3.0, -7.0, 1e10, 1e-10, 0.3])]),
        );
    }
    ops
}
