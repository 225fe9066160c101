//! Conversions: widths and signs of integers, integers to and from floats in every rounding mode, between float formats,
//! packed fp8, and saturation.

use super::super::elementwise::{Op, Ty, Value, binary, cases, image, unary};
use super::super::number::{BF16, Binary, E4M3, E5M2, F16, F32, Mode, TF32};
use super::super::{Half, Want};
use super::Family;

pub fn family() -> Family {
    let mut ops = integers();
    ops.extend(float_to_integer());
    ops.extend(integer_to_float());
    ops.extend(between_floats());
    ops.extend(packed());
    ops.extend(fp8());
    Family::table("convert", image("Conversions between integer and float formats.", &ops), cases("convert", &ops))
}

const MODES: [(&str, Mode); 4] = [("rn", Mode::Rn), ("rz", Mode::Rz), ("rm", Mode::Rm), ("rp", Mode::Rp)];

fn integers() -> Vec<Op> {
    vec![
        unary("cvt.u32.u16", |a: u16| u32::from(a)),
        unary("cvt.s32.s16", |a: i16| i32::from(a)),
        unary("cvt.u16.u32", |a: u32| a as u16),
        unary("cvt.s64.s32", |a: i32| i64::from(a)),
        unary("cvt.u64.u32", |a: u32| u64::from(a)),
        unary("cvt.u32.u64", |a: u64| a as u32),
        unary("cvt.s32.s8", |a: u32| i32::from(a as i8)),
        unary("cvt.u32.u8", |a: u32| u32::from(a as u8)),
        unary("cvt.u16.u8", |a: u16| u16::from(a as u8)),
        unary("cvt.s64.s16", |a: i16| i64::from(a)),
        // Narrowing to a byte in a wider register extends the byte to the register.
        unary("cvt.s8.s32", |a: i32| i32::from(a as i8)),
        unary("cvt.u8.u32", |a: u32| u32::from(a as u8)),
        unary("cvt.sat.u8.s32", |a: i32| a.clamp(0, 255)),
        unary("cvt.sat.s8.s32", |a: i32| a.clamp(-128, 127)),
        unary("cvt.sat.s16.s32", |a: i32| a.clamp(-32768, 32767) as i16),
        unary("cvt.sat.u16.s32", |a: i32| a.clamp(0, 65535) as u16),
        unary("cvt.sat.s32.s64", |a: i64| a.clamp(i32::MIN.into(), i32::MAX.into()) as i32),
        unary("cvt.sat.u32.s64", |a: i64| a.clamp(0, u32::MAX.into()) as u32),
        unary("cvt.sat.s32.u32", |a: u32| a.min(i32::MAX as u32)),
        unary("cvt.sat.u32.s32", |a: i32| a.max(0)),
        binary("cvt.pack.sat.s16.s32", |a: i32, b: i32| {
            let half = |x: i32| x.clamp(-32768, 32767) as u16;
            u32::from(half(a)) << 16 | u32::from(half(b))
        }),
    ]
}

/// To an integral value; ties as the mode says.
fn integral(x: f64, mode: Mode) -> f64 {
    match mode {
        Mode::Rn => x.round_ties_even(),
        Mode::Rna => x.round(),
        Mode::Rz => x.trunc(),
        Mode::Rm => x.floor(),
        Mode::Rp => x.ceil(),
    }
}

/// Clamped to the integer type. NaN is zero, or the top bit if a 64-bit type is on either side.
fn to_integer(x: f64, bits: u32, signed: bool, mode: Mode, wide: bool) -> u64 {
    if x.is_nan() {
        return if wide { 1 << (bits - 1) } else { 0 };
    }
    let x = integral(x, mode);
    let mask = u64::MAX >> (64 - bits);
    match (signed, bits) {
        (true, 64) => x as i64 as u64,
        (false, 64) => x as u64,
        (true, _) => x.clamp(-(2f64.powi(bits as i32 - 1)), 2f64.powi(bits as i32 - 1) - 1.0) as i64 as u64 & mask,
        (false, _) => x.clamp(0.0, 2f64.powi(bits as i32) - 1.0) as u64,
    }
}

/// Values around the limits of the integer types, ties, and the specials.
const REALS: [f64; 40] = [
    0.0,
    -0.0,
    0.25,
    0.5,
    -0.5,
    0.75,
    1.0,
    -1.0,
    1.5,
    -1.5,
    2.5,
    -2.5,
    3.5,
    100.7,
    -100.7,
    127.5,
    128.0,
    -128.5,
    255.5,
    256.0,
    32767.5,
    -32769.0,
    65535.5,
    65536.0,
    8_388_607.5,
    16_777_217.0,
    2_147_483_647.0,
    2_147_483_648.0,
    -2_147_483_648.0,
    -2_147_483_904.0,
    4_294_967_295.0,
    4_294_967_296.0,
    9.2e18,
    1.9e19,
    -9.3e18,
    1e30,
    -1e30,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::NAN,
];

fn float_to_integer() -> Vec<Op> {
    let mut ops = Vec::new();
    let f32s: Vec<u64> = REALS.iter().map(|&x| u64::from((x as f32).to_bits())).collect();
    let f64s: Vec<u64> = REALS.iter().map(|x| x.to_bits()).collect();
    let f16s: Vec<u64> = REALS.iter().map(|&x| F16.round(x, Mode::Rn).unwrap_or(0x7E00)).collect();
    let bf16s: Vec<u64> = REALS.iter().map(|&x| BF16.round(x, Mode::Rn).unwrap_or(0x7FC0)).collect();
    for (name, mode) in MODES {
        for (integer, bits, signed, out) in
            [("s32", 32, true, Ty::B32), ("u32", 32, false, Ty::B32), ("s64", 64, true, Ty::B64), ("u64", 64, false, Ty::B64)]
        {
            ops.push(
                Op::new(&format!("cvt.{name}i.{integer}.f32"), &[Ty::F32], out, move |x| {
                    Want::Bits(to_integer(F32.value(x[0]), bits, signed, mode, bits == 64))
                })
                .values(&[&f32s]),
            );
            ops.push(
                Op::new(&format!("cvt.{name}i.{integer}.f64"), &[Ty::F64], out, move |x| {
                    Want::Bits(to_integer(f64::from_bits(x[0]), bits, signed, mode, true))
                })
                .values(&[&f64s]),
            );
        }
        ops.push(
            Op::new(&format!("cvt.{name}i.f32.f32"), &[Ty::F32], Ty::F32, move |x| (integral(F32.value(x[0]), mode) as f32).want())
                .values(&[&f32s]),
        );
        ops.push(
            Op::new(&format!("cvt.{name}i.f64.f64"), &[Ty::F64], Ty::F64, move |x| integral(f64::from_bits(x[0]), mode).want())
                .values(&[&f64s]),
        );
    }
    for (integer, bits, signed, out) in
        [("s16", 16, true, Ty::B16), ("u16", 16, false, Ty::B16), ("s32", 32, true, Ty::B32), ("u32", 32, false, Ty::B32)]
    {
        ops.push(
            Op::new(&format!("cvt.rni.{integer}.f16"), &[Ty::F16], out, move |x| {
                Want::Bits(to_integer(F16.value(x[0]), bits, signed, Mode::Rn, false))
            })
            .values(&[&f16s]),
        );
        ops.push(
            Op::new(&format!("cvt.rzi.{integer}.bf16"), &[Ty::Bf16], out, move |x| {
                Want::Bits(to_integer(BF16.value(x[0]), bits, signed, Mode::Rz, false))
            })
            .values(&[&bf16s]),
        );
    }
    ops.push(
        Op::new("cvt.rzi.ftz.s32.f32", &[Ty::F32], Ty::B32, |x| Want::Bits(to_integer(F32.value(x[0]), 32, true, Mode::Rz, false)))
            .values(&[&f32s]),
    );
    // A positive subnormal rounds up to one, unless it is flushed first.
    ops.push(
        unary("cvt.rpi.s32.f32", |a: f32| i32::from(a > 0.0))
            .values(&[&[1, 0x007F_FFFF, 0, 0x8000_0001]])
            .body("cvt.rpi.s32.f32 of subnormals", "cvt.rpi.s32.f32 %d, %a;"),
    );
    ops.push(unary("cvt.rpi.ftz.s32.f32", |a: f32| i32::from(a >= f32::MIN_POSITIVE)).values(&[&[1, 0x007F_FFFF, 0, 0x8000_0001]]));
    ops.push(unary("cvt.rzi.s8.f32", |a: f32| if a.is_nan() { 0 } else { a.trunc().clamp(-128.0, 127.0) as i32 }).values(&[&f32s]));
    ops.push(unary("cvt.rzi.u8.f32", |a: f32| if a.is_nan() { 0 } else { a.trunc().clamp(0.0, 255.0) as i32 }).values(&[&f32s]));
    ops
}

/// An integer as a float; the result of an i64 or u64 is rounded once.
fn from_integer(format: Binary, magnitude: u64, negative: bool, mode: Mode) -> u64 {
    // To odd on 53 bits first, as number.rs explains.
    let excess = 11u32.saturating_sub(magnitude.leading_zeros());
    let kept = magnitude >> excess | u64::from(magnitude & ((1 << excess) - 1) != 0);
    let exact = kept as f64 * 2f64.powi(excess as i32);
    format.round(if negative { -exact } else { exact }, mode).expect("an integer is a number")
}

fn integer_to_float() -> Vec<Op> {
    let mut ops = Vec::new();
    for (name, mode) in MODES {
        for (integer, ty, bits, signed) in
            [("s32", Ty::B32, 32, true), ("u32", Ty::B32, 32, false), ("s64", Ty::B64, 64, true), ("u64", Ty::B64, 64, false)]
        {
            let read = move |x: u64| {
                let value = if signed { i128::from((x << (64 - bits)) as i64 >> (64 - bits)) } else { i128::from(x) };
                (value.unsigned_abs() as u64, value < 0)
            };
            ops.push(Op::new(&format!("cvt.{name}.f32.{integer}"), &[ty], Ty::F32, move |x| {
                let (magnitude, negative) = read(x[0]);
                Want::Bits(from_integer(F32, magnitude, negative, mode))
            }));
            if mode == Mode::Rn {
                ops.push(Op::new(&format!("cvt.{name}.f64.{integer}"), &[ty], Ty::F64, move |x| {
                    let (magnitude, negative) = read(x[0]);
                    (if negative { -(magnitude as f64) } else { magnitude as f64 }).want()
                }));
            }
            if bits == 32 {
                ops.push(Op::new(&format!("cvt.{name}.f16.{integer}"), &[ty], Ty::F16, move |x| {
                    let (magnitude, negative) = read(x[0]);
                    Want::Bits(from_integer(F16, magnitude, negative, mode))
                }));
            }
        }
    }
    ops.push(unary("cvt.rn.f32.u16", |a: u16| f32::from(a)));
    ops.push(unary("cvt.rn.f32.s16", |a: i16| f32::from(a)));
    ops.push(unary("cvt.rn.f32.u8", |a: u16| f32::from(a as u8)));
    ops.push(unary("cvt.rn.f32.s8", |a: u16| f32::from(a as i8)));
    ops.push(Op::new("cvt.rn.bf16.s32", &[Ty::B32], Ty::Bf16, |x| {
        let value = x[0] as u32 as i32;
        Want::Bits(from_integer(BF16, value.unsigned_abs().into(), value < 0, Mode::Rn))
    }));
    ops
}

/// Either zero, where the ISA does not say which.
const ZERO: Want = Want::Near { value: 0.0, relative: 0.0, absolute: 0.0 };

fn rounded(format: Binary, x: f64, mode: Mode) -> Want {
    format.round(x, mode).map_or(Want::Nan, Want::Bits)
}

fn between_floats() -> Vec<Op> {
    let mut ops = vec![
        Op::new("cvt.f32.f16", &[Ty::F16], Ty::F32, |x| (F16.value(x[0]) as f32).want()),
        Op::new("cvt.f32.bf16", &[Ty::Bf16], Ty::F32, |x| (BF16.value(x[0]) as f32).want()),
        Op::new("cvt.f64.f16", &[Ty::F16], Ty::F64, |x| F16.value(x[0]).want()),
        unary("cvt.f64.f32", |a: f32| f64::from(a)),
        unary("cvt.ftz.f64.f32", |a: f32| f64::from(if a.is_subnormal() { 0f32.copysign(a) } else { a })),
        Op::new("cvt.sat.f32.f32", &[Ty::F32], Ty::F32, |x| {
            let value = F32.value(x[0]);
            if value > 0.0 { rounded(F32, value.min(1.0), Mode::Rn) } else { ZERO }
        }),
        unary("cvt.rn.ftz.f32.f64", |a: f64| {
            let narrow = a as f32;
            if narrow.is_subnormal() { 0f32.copysign(narrow) } else { narrow }
        }),
        Op::new("cvt.rna.tf32.f32", &[Ty::F32], Ty::B32, |x| {
            // tf32 lies in the top 19 bits of its register.
            TF32.round(F32.value(x[0]), Mode::Rna).map_or(Want::Nan, |bits| Want::Bits(bits << 13))
        })
        .values(&[&Ty::F32.edges().into_iter().filter(|&bits| !F32.value(bits).is_nan()).collect::<Vec<_>>()]),
        Op::new("cvt.rn.relu.f16.f32", &[Ty::F32], Ty::F16, |x| {
            let value = F32.value(x[0]);
            if value <= 0.0 { ZERO } else { rounded(F16, value, Mode::Rn) }
        }),
        Op::new("cvt.rn.relu.bf16.f32", &[Ty::F32], Ty::Bf16, |x| {
            let value = F32.value(x[0]);
            if value <= 0.0 { ZERO } else { rounded(BF16, value, Mode::Rn) }
        }),
        Op::new("cvt.rn.sat.f16.f32", &[Ty::F32], Ty::F16, |x| {
            let value = F32.value(x[0]);
            if value > 0.0 { rounded(F16, value.min(1.0), Mode::Rn) } else { ZERO }
        }),
    ];
    // Ties, neighbours of ties, overflow and subnormals of the narrow formats.
    let near = |format: Binary| {
        let mut values = Vec::new();
        for code in [0u64, 1, 2, 5, format.largest() / 2, format.largest() / 2 + 1, format.largest() - 1, format.largest()] {
            let (low, high) =
                (format.value(code), if code == format.largest() { format.value(code) * 1.01 } else { format.value(code + 1) });
            for x in [low, (low + high) / 2.0, low + (high - low) * 0.25, low + (high - low) * 0.75, -(low + high) / 2.0] {
                values.push(x);
            }
        }
        values.extend([f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 1e38, -1e-40, 65519.0, 65520.0]);
        values
    };
    // Between the two formats of sixteen bits the mode may be left out: to nearest, as ptxas assembles it.
    let codes = |format: Binary| near(format).iter().map(|&x| format.round(x, Mode::Rn).unwrap_or(0x7FFF)).collect::<Vec<_>>();
    for (name, mode) in [("cvt", Mode::Rn), ("cvt.rn", Mode::Rn), ("cvt.rz", Mode::Rz)] {
        let to_bf16 = Op::new(&format!("{name}.bf16.f16"), &[Ty::F16], Ty::Bf16, move |x| rounded(BF16, F16.value(x[0]), mode));
        let to_f16 = Op::new(&format!("{name}.f16.bf16"), &[Ty::Bf16], Ty::F16, move |x| rounded(F16, BF16.value(x[0]), mode));
        ops.push(to_bf16.values(&[&[codes(F16), Ty::F16.edges()].concat()]));
        ops.push(to_f16.values(&[&[codes(BF16), Ty::Bf16.edges()].concat()]));
    }
    for (name, mode) in MODES {
        let f64s = |format: Binary| near(format).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        ops.push(
            Op::new(&format!("cvt.{name}.f32.f64"), &[Ty::F64], Ty::F32, move |x| rounded(F32, f64::from_bits(x[0]), mode))
                .values(&[&f64s(F32)]),
        );
        ops.push(
            Op::new(&format!("cvt.{name}.f16.f64"), &[Ty::F64], Ty::F16, move |x| rounded(F16, f64::from_bits(x[0]), mode))
                .values(&[&f64s(F16)]),
        );
        let f32s = |format: Binary| near(format).iter().map(|&x| u64::from((x as f32).to_bits())).collect::<Vec<_>>();
        ops.push(
            Op::new(&format!("cvt.{name}.f16.f32"), &[Ty::F32], Ty::F16, move |x| rounded(F16, F32.value(x[0]), mode))
                .values(&[&f32s(F16)]),
        );
        if matches!(mode, Mode::Rn | Mode::Rz) {
            ops.push(
                Op::new(&format!("cvt.{name}.bf16.f32"), &[Ty::F32], Ty::Bf16, move |x| rounded(BF16, F32.value(x[0]), mode))
                    .values(&[&f32s(BF16)]),
            );
        }
    }
    ops
}

fn half(format: Binary, x: f64, mode: Mode) -> Half {
    format.round(x, mode).map_or(Half::Nan, |bits| Half::Bits(bits as u16))
}

/// `cvt.f16x2.f32 d, a, b` puts a in the upper half.
fn packed() -> Vec<Op> {
    let mut ops = Vec::new();
    for (format, name, ty) in [(F16, "f16x2", Ty::F16x2), (BF16, "bf16x2", Ty::Bf16x2)] {
        for (text, mode) in [("rn", Mode::Rn), ("rz", Mode::Rz)] {
            ops.push(Op::new(&format!("cvt.{text}.{name}.f32"), &[Ty::F32; 2], ty, move |x| {
                Want::Pair(half(format, F32.value(x[1]), mode), half(format, F32.value(x[0]), mode))
            }));
        }
        ops.push(Op::new(&format!("cvt.rn.relu.{name}.f32"), &[Ty::F32; 2], ty, move |x| {
            let relu = |x: f64| if x <= 0.0 { Half::Near { value: 0.0, relative: 0.0 } } else { half(format, x, Mode::Rn) };
            Want::Pair(relu(F32.value(x[1])), relu(F32.value(x[0])))
        }));
    }
    ops
}

/// One fp8 code, saturated. The ISA does not say which NaN a NaN becomes.
fn fp8_code(format: Binary, x: f64) -> Half {
    format.round_finite(x).map_or(Half::Nan, |bits| Half::Bits(bits as u16))
}

fn fp8() -> Vec<Op> {
    let mut ops = Vec::new();
    for (format, name, ty) in [(E4M3, "e4m3x2", Ty::E4m3x2), (E5M2, "e5m2x2", Ty::E5m2x2)] {
        let mut reals: Vec<f64> = Vec::new();
        for code in [0u64, 1, 2, 3, 7, 8, 9, 0x30, 0x38, 0x3B, 0x77, 0x7A] {
            let (low, high) = (format.value(code), format.value(code + 1));
            reals.extend([low, (low + high) / 2.0, -(low + (high - low) * 0.75)]);
        }
        reals.extend([448.0, 464.0, 465.0, 480.0, 57344.0, 61440.0, 1e9, -1e9, f64::INFINITY, f64::NEG_INFINITY, -0.0, f64::NAN]);
        let f32s: Vec<u64> = reals.iter().map(|&x| u64::from((x as f32).to_bits())).collect();
        let few: Vec<u64> = f32s.iter().copied().step_by(5).collect();
        let halves: Vec<u64> = reals.iter().map(|&x| F16.round(x, Mode::Rn).unwrap_or(0x7E00)).collect();
        let pairs: Vec<u64> = (0..halves.len()).map(|i| halves[i] | halves[(7 * i + 2) % halves.len()] << 16).collect();
        let relu = move |x: f64| if x <= 0.0 { Half::Near { value: 0.0, relative: 0.0 } } else { fp8_code(format, x) };
        ops.extend([
            Op::new(&format!("cvt.rn.satfinite.{name}.f32"), &[Ty::F32; 2], ty, move |x| {
                Want::Pair(fp8_code(format, F32.value(x[1])), fp8_code(format, F32.value(x[0])))
            })
            .values(&[&f32s, &few]),
            Op::new(&format!("cvt.rn.satfinite.relu.{name}.f32"), &[Ty::F32; 2], ty, move |x| {
                Want::Pair(relu(F32.value(x[1])), relu(F32.value(x[0])))
            })
            .values(&[&f32s, &few]),
            Op::new(&format!("cvt.rn.satfinite.{name}.f16x2"), &[Ty::F16x2], ty, move |x| {
                Want::Pair(fp8_code(format, F16.value(x[0] & 0xFFFF)), fp8_code(format, F16.value(x[0] >> 16)))
            })
            .values(&[&pairs]),
            Op::new(&format!("cvt.rn.f16x2.{name}"), &[ty], Ty::F16x2, move |x| {
                Want::Pair(half(F16, format.value(x[0] & 0xFF), Mode::Rn), half(F16, format.value(x[0] >> 8), Mode::Rn))
            }),
        ]);
    }
    ops
}
