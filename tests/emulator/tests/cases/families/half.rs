//! f16 and bf16 arithmetic, scalar and packed.

use super::super::Half;
use super::super::elementwise::{Op, Ty, Value, binary, cases, half_op, image};
use super::super::number::{BF16, F16, Mode, add_odd, fma_odd};
use super::Family;

pub fn family() -> Family {
    let mut ops = Vec::new();
    for (ty, name) in [(Ty::F16, "f16"), (Ty::F16x2, "f16x2"), (Ty::Bf16, "bf16"), (Ty::Bf16x2, "bf16x2")] {
        ops.extend(arithmetic(ty, name));
        ops.extend(extremes(ty, name));
    }
    ops.extend(variants());
    ops.extend(comparisons());
    ops.extend(approximations());
    Family::table("half", image("f16 and bf16 arithmetic, scalar and packed.", &ops), cases("half", &ops))
}

/// Rounded to nearest even.
fn nearest(ty: Ty, exact: f64) -> Half {
    let format = if ty == Ty::F16 { F16 } else { BF16 };
    format.round(exact, Mode::Rn).map_or(Half::Nan, |bits| Half::Bits(bits as u16))
}

/// Either zero, where the ISA does not say which.
const ZERO: Half = Half::Near { value: 0.0, relative: 0.0 };

/// Rounded, then to [0, 1]; NaN becomes zero.
fn saturated(ty: Ty, exact: f64) -> Half {
    if exact > 0.0 { nearest(ty, exact.min(1.0)) } else { ZERO }
}

/// Rounded, then negative results become zero; NaN stays.
fn rectified(ty: Ty, exact: f64) -> Half {
    if exact <= 0.0 { ZERO } else { nearest(ty, exact) }
}

/// f16 with subnormal results flushed; a result is subnormal before rounding or not at all in the cases chosen.
fn flushed(ty: Ty, exact: f64) -> Half {
    nearest(ty, flush(exact))
}

fn flush(x: f64) -> f64 {
    if x.abs() < 2f64.powi(-14) { 0f64.copysign(x) } else { x }
}

fn arithmetic(ty: Ty, name: &str) -> Vec<Op> {
    vec![
        half_op(&format!("add.{name}"), ty, 2, |x| add_odd(x[0], x[1]), nearest),
        half_op(&format!("sub.{name}"), ty, 2, |x| add_odd(x[0], -x[1]), nearest),
        half_op(&format!("mul.{name}"), ty, 2, |x| x[0] * x[1], nearest),
        half_op(&format!("fma.rn.{name}"), ty, 3, |x| fma_odd(x[0], x[1], x[2]), nearest),
        half_op(&format!("fma.rn.relu.{name}"), ty, 3, |x| fma_odd(x[0], x[1], x[2]), rectified),
        half_op(&format!("neg.{name}"), ty, 1, |x| -x[0], nearest),
        half_op(&format!("abs.{name}"), ty, 1, |x| x[0].abs(), nearest),
    ]
}

fn min(x: &[f64]) -> f64 {
    let (a, b) = (x[0], x[1]);
    if a.is_nan() || b < a || (a == b && b.is_sign_negative()) { b } else { a }
}

fn max(x: &[f64]) -> f64 {
    let (a, b) = (x[0], x[1]);
    if a.is_nan() || b > a || (a == b && a.is_sign_negative()) { b } else { a }
}

fn extremes(ty: Ty, name: &str) -> Vec<Op> {
    vec![
        half_op(&format!("min.{name}"), ty, 2, min, nearest),
        half_op(&format!("max.{name}"), ty, 2, max, nearest),
        half_op(&format!("min.NaN.{name}"), ty, 2, |x| if x[0].is_nan() || x[1].is_nan() { f64::NAN } else { min(x) }, nearest),
        half_op(&format!("max.NaN.{name}"), ty, 2, |x| if x[0].is_nan() || x[1].is_nan() { f64::NAN } else { max(x) }, nearest),
    ]
}

fn variants() -> Vec<Op> {
    // Values whose sums and products lie clear of the boundary between normal and subnormal.
    const PLAIN: &[u64] = &[0x0000, 0x8000, 0x0001, 0x83FF, 0x3C00, 0xBC00, 0x4248, 0x7BFF, 0x7C00, 0x7E00];
    const VALUES: &[u64] = &[0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x8400, 0x3C00, 0xBC00, 0x4248, 0x7BFF, 0x7C00, 0x7E00];
    vec![
        half_op("add.sat.f16", Ty::F16, 2, |x| add_odd(x[0], x[1]), saturated),
        half_op("mul.sat.f16x2", Ty::F16x2, 2, |x| x[0] * x[1], saturated),
        half_op("fma.rn.sat.f16", Ty::F16, 3, |x| fma_odd(x[0], x[1], x[2]), saturated),
        half_op("add.ftz.f16", Ty::F16, 2, |x| add_odd(flush(x[0]), flush(x[1])), flushed).values(&[VALUES, VALUES]),
        half_op("mul.ftz.f16", Ty::F16, 2, |x| flush(x[0]) * flush(x[1]), flushed).values(&[VALUES, VALUES]),
        half_op("fma.rn.ftz.f16", Ty::F16, 3, |x| fma_odd(flush(x[0]), flush(x[1]), flush(x[2])), flushed).values(&[PLAIN, PLAIN, VALUES]),
        half_op("max.ftz.f16", Ty::F16, 2, |x| max(&[flush(x[0]), flush(x[1])]), nearest).values(&[VALUES, VALUES]),
        half_op(
            "min.xorsign.abs.bf16",
            Ty::Bf16,
            2,
            |x| {
                let negative = x[0].is_sign_negative() != x[1].is_sign_negative();
                min(&[x[0].abs(), x[1].abs()]).copysign(if negative { -1.0 } else { 1.0 })
            },
            nearest,
        ),
        binary("canonical", |_: u16, _: u16| 0x7FFFu16)
            .values(&[&[0x7C01, 0xFE12], &[0x7E00, 0xFFFF]])
            .body("min.f16 of two NaN", "min.f16 %d, %a, %b;"),
        binary("canonical", |_: u16, _: u16| 0x7FFFu16)
            .values(&[&[0x7F81, 0xFFC2], &[0x7FC0, 0x3F80]])
            .body("max.NaN.bf16 of a NaN", "max.NaN.bf16 %d, %a, %b;"),
    ]
}

fn comparisons() -> Vec<Op> {
    let mut ops = Vec::new();
    let tests: [(&str, fn(f64, f64) -> bool); 6] = [
        ("eq", |a, b| a == b),
        ("lt", |a, b| a < b),
        ("ge", |a, b| a >= b),
        ("neu", |a, b| a != b),
        ("gtu", |a, b| a > b || a.is_nan() || b.is_nan()),
        ("nan", |a, b| a.is_nan() || b.is_nan()),
    ];
    for (name, holds) in tests {
        for (ty, text, format) in [(Ty::F16, "f16", F16), (Ty::Bf16, "bf16", BF16)] {
            ops.push(
                Op::new("", &[ty; 2], Ty::B32, move |x| u32::from(holds(format.value(x[0]), format.value(x[1]))).want())
                    .body(&format!("setp.{name}.{text}"), &format!(".reg .pred p;\nsetp.{name}.{text} p, %a, %b;\nselp.u32 %d, 1, 0, p;")),
            );
        }
        ops.push(
            Op::new("", &[Ty::F16x2; 2], Ty::B32, move |x| {
                let half = |shift: u32| u32::from(holds(F16.value(x[0] >> shift & 0xFFFF), F16.value(x[1] >> shift & 0xFFFF)));
                (half(0) + 2 * half(16)).want()
            })
            .body(
                &format!("setp.{name}.f16x2"),
                &format!(
                    ".reg .pred p, q;\n.reg .b32 e;\nsetp.{name}.f16x2 p|q, %a, %b;\nselp.u32 %d, 1, 0, p;\nselp.u32 e, 2, 0, q;\nadd.u32 %d, %d, e;"
                ),
            ),
        );
    }
    ops
}

fn approximations() -> Vec<Op> {
    let ex2 = |name: &str, ty: Ty, bound: fn(Ty, f64) -> Half| half_op(name, ty, 1, |x| x[0].exp2(), bound);
    // The bounds of the ISA, and half a unit in the last place for the rounding to the format.
    fn f16_bound(_: Ty, value: f64) -> Half {
        Half::Near { value, relative: 2f64.powf(-9.9) + 2f64.powi(-11) }
    }
    fn bf16_bound(_: Ty, value: f64) -> Half {
        Half::Near { value, relative: 2f64.powi(-7) + 2f64.powi(-9) }
    }
    const F16_POWERS: &[u64] = &[0x0000, 0x8000, 0x3C00, 0xBC00, 0x3800, 0x4248, 0xC248, 0x4900, 0x4B80, 0x7E00, 0x7C00, 0xFC00];
    const BF16_POWERS: &[u64] = &[0x0000, 0x8000, 0x3F80, 0xBF80, 0x3F00, 0x4049, 0xC049, 0x42C8, 0xC2C8, 0x7FC0, 0x7F80, 0xFF80];
    let tanh = |name: &str, ty: Ty, bound: fn(Ty, f64) -> Half| half_op(name, ty, 1, |x| x[0].tanh(), bound);
    let packed = |values: &[u64]| -> Vec<u64> { (0..values.len()).map(|i| values[i] | values[(i * 5 + 1) % values.len()] << 16).collect() };
    vec![
        ex2("ex2.approx.f16", Ty::F16, f16_bound).values(&[F16_POWERS]),
        ex2("ex2.approx.f16x2", Ty::F16x2, f16_bound).values(&[&packed(F16_POWERS)]),
        ex2("ex2.approx.ftz.bf16", Ty::Bf16, bf16_bound).values(&[BF16_POWERS]),
        ex2("ex2.approx.ftz.bf16x2", Ty::Bf16x2, bf16_bound).values(&[&packed(BF16_POWERS)]),
        tanh("tanh.approx.f16", Ty::F16, f16_bound).values(&[F16_POWERS]),
        tanh("tanh.approx.bf16x2", Ty::Bf16x2, bf16_bound).values(&[&packed(BF16_POWERS)]),
    ]
}
