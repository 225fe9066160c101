//! Arithmetic and conversions on random bits, against plain Rust and the `half` crate.
//!
//! The entry points are those of `kernels/instructions`, with 128 random tuples of inputs per launch; the oracles here
//! share nothing with those of the tables.

#[path = "cases/mod.rs"]
mod cases;
#[path = "runner/mod.rs"]
mod runner;

use cases::Want;
use cases::elementwise::{Op, Ty, Value, binary, ternary, unary};
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use ptx_emulator::{Detectors, Options};
use runner::Session;
use std::fs;

impl Value for f16 {
    const TY: Ty = Ty::F16;
    fn from_bits(bits: u64) -> Self {
        f16::from_bits(bits as u16)
    }
    fn want(self) -> Want {
        if self.is_nan() { Want::Nan } else { Want::Bits(self.to_bits().into()) }
    }
}

impl Value for bf16 {
    const TY: Ty = Ty::Bf16;
    fn from_bits(bits: u64) -> Self {
        bf16::from_bits(bits as u16)
    }
    fn want(self) -> Want {
        if self.is_nan() { Want::Nan } else { Want::Bits(self.to_bits().into()) }
    }
}

/// Random bits, and now and then something near a limit: few bits set, all but few, a float of moderate size.
fn operand() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => any::<u64>(),
        1 => (0u64..64, 0u64..4).prop_map(|(at, low)| (1u64 << at).wrapping_add(low)),
        1 => (0u64..64, 0u64..4).prop_map(|(at, low)| !(1u64 << at).wrapping_add(low)),
        // The same float in every width: the top bits of an f64 and an f32, and both halves.
        1 => (-100i32..100, -3i32..3).prop_map(|(mantissa, scale)| {
            let x = mantissa as f32 * 2f32.powi(7 * scale);
            u64::from(f16::from_f32(x).to_bits()) | u64::from(bf16::from_f32(x).to_bits()) << 16 | u64::from(x.to_bits()) << 32
        }),
        1 => any::<f32>().prop_map(|x| u64::from(x.to_bits()) | u64::from(x.to_bits()) << 32),
    ]
}

const THREADS: usize = 128;

/// Launches each operation 400 times on random inputs.
fn hold(image: &'static str, ops: Vec<Op>) {
    let text = fs::read_to_string(runner::kernels().join(format!("instructions/{image}.ptx"))).expect("the image is committed");
    let options = Options { detectors: Detectors::none(), ..Options::default() };
    let session = std::cell::RefCell::new(Session::new(image, &text, options).expect("the image loads"));
    let mut runner = TestRunner::new(Config { cases: 400, failure_persistence: None, ..Config::default() });
    for op in ops {
        let tuple = proptest::collection::vec(operand(), op.inputs.len());
        runner
            .run(&proptest::collection::vec(tuple, THREADS), |mut tuples| {
                for tuple in &mut tuples {
                    for (bits, ty) in tuple.iter_mut().zip(&op.inputs) {
                        *bits = if ty.bytes() == 4 { *bits >> 32 } else { *bits } & (u64::MAX >> (64 - 8 * ty.bytes()));
                    }
                }
                let case = op.case_of(image, &tuples);
                session.borrow_mut().run(&case).map_err(|why| TestCaseError::fail(format!("{}: {why}", case.name)))
            })
            .unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn integers() {
    hold(
        "integer",
        vec![
            binary("add.s32", i32::wrapping_add),
            binary("add.sat.s32", i32::saturating_add),
            binary("sub.u32", u32::wrapping_sub),
            binary("sub.s64", i64::wrapping_sub),
            binary("mul.lo.u32", u32::wrapping_mul),
            binary("mul.wide.s32", |a: i32, b: i32| i64::from(a) * i64::from(b)),
            binary("mul.hi.u64", |a: u64, b: u64| ((u128::from(a) * u128::from(b)) >> 64) as u64),
            binary("mul.hi.s32", |a: i32, b: i32| ((i64::from(a) * i64::from(b)) >> 32) as i32),
            ternary("mad.lo.s32", |a: i32, b: i32, c: i32| a.wrapping_mul(b).wrapping_add(c)),
            ternary("mad.wide.u32", |a: u32, b: u32, c: u64| (u64::from(a) * u64::from(b)).wrapping_add(c)),
            binary("min.s32", i32::min),
            binary("max.u64", u64::max),
            unary("popc.b64", u64::count_ones),
            unary("clz.b32", u32::leading_zeros),
            unary("brev.b64", u64::reverse_bits),
            unary("abs.s32", i32::wrapping_abs),
            ternary("shf.l.wrap.b32", |a: u32, b: u32, n: u32| if n & 31 == 0 { b } else { b << (n & 31) | a >> (32 - (n & 31)) }),
            binary("shl.b64", |a: u64, n: u32| a.checked_shl(n).unwrap_or(0)),
            binary("shr.s32", |a: i32, n: u32| a >> n.min(31)),
            binary("setp.lt.s64", |a: i64, b: i64| u32::from(a < b)),
            binary("setp.ge.u32", |a: u32, b: u32| u32::from(a >= b)),
            binary("max.u16x2", |a: u32, b: u32| (a >> 16).max(b >> 16) << 16 | (a & 0xFFFF).max(b & 0xFFFF)),
        ],
    );
}

#[test]
fn floats() {
    hold(
        "float",
        vec![
            binary("add.f32", |a: f32, b: f32| a + b),
            binary("sub.rn.f32", |a: f32, b: f32| a - b),
            binary("mul.f32", |a: f32, b: f32| a * b),
            ternary("fma.rn.f32", f32::mul_add),
            binary("div.rn.f32", |a: f32, b: f32| a / b),
            unary("sqrt.rn.f32", f32::sqrt),
            unary("rcp.rn.f32", |a: f32| 1.0 / a),
            binary("add.f64", |a: f64, b: f64| a + b),
            binary("mul.f64", |a: f64, b: f64| a * b),
            ternary("fma.rn.f64", f64::mul_add),
            binary("div.rn.f64", |a: f64, b: f64| a / b),
            unary("sqrt.rn.f64", f64::sqrt),
            binary("setp.lt.f32", |a: f32, b: f32| u32::from(a < b)),
            binary("setp.geu.f64", |a: f64, b: f64| u32::from(a >= b || a.is_nan() || b.is_nan())),
            binary("setp.nan.f32", |a: f32, b: f32| u32::from(a.is_nan() || b.is_nan())),
        ],
    );
}

/// `half` computes in f32, which has enough bits for its one rounding more to change nothing.
#[test]
fn halves() {
    hold(
        "half",
        vec![
            binary("add.f16", |a: f16, b: f16| a + b),
            binary("sub.f16", |a: f16, b: f16| a - b),
            binary("mul.f16", |a: f16, b: f16| a * b),
            binary("add.bf16", |a: bf16, b: bf16| a + b),
            binary("mul.bf16", |a: bf16, b: bf16| a * b),
            unary("neg.f16", |a: f16| -a),
            binary("setp.lt.bf16", |a: bf16, b: bf16| u32::from(a < b)),
            binary("setp.ge.f16", |a: f16, b: f16| u32::from(a >= b)),
        ],
    );
}

#[test]
fn conversions() {
    hold(
        "convert",
        vec![
            unary("cvt.rn.f16.f32", f16::from_f32),
            unary("cvt.rn.bf16.f32", bf16::from_f32),
            unary("cvt.rn.f16.f64", f16::from_f64_exact),
            unary("cvt.f32.f16", f16::to_f32),
            unary("cvt.f32.bf16", bf16::to_f32),
            unary("cvt.f64.f16", f16::to_f64),
            unary("cvt.rn.f32.f64", |a: f64| a as f32),
            unary("cvt.f64.f32", |a: f32| f64::from(a)),
            unary("cvt.rzi.s32.f32", |a: f32| a as i32),
            unary("cvt.rzi.u32.f32", |a: f32| a as u32),
            unary("cvt.rni.s32.f32", |a: f32| a.round_ties_even() as i32),
            unary("cvt.rmi.s64.f64", |a: f64| if a.is_nan() { i64::MIN } else { a.floor() as i64 }),
            unary("cvt.rzi.u64.f32", |a: f32| if a.is_nan() { 1 << 63 } else { a as u64 }),
            unary("cvt.rpi.f32.f32", f32::ceil),
            unary("cvt.rn.f32.s32", |a: i32| a as f32),
            unary("cvt.rn.f32.u64", |a: u64| a as f32),
            unary("cvt.rn.f64.s64", |a: i64| a as f64),
            unary("cvt.s64.s32", |a: i32| i64::from(a)),
            unary("cvt.sat.u8.s32", |a: i32| a.clamp(0, 255)),
            unary("cvt.sat.s32.s64", |a: i64| a.clamp(i32::MIN.into(), i32::MAX.into()) as i32),
        ],
    );
}

/// `half` narrows an f64 through f32 on some machines, which rounds twice; this rounds once.
trait Exact {
    fn from_f64_exact(x: f64) -> f16;
}

impl Exact for f16 {
    fn from_f64_exact(x: f64) -> f16 {
        // The nearest f32 with its last bit set if anything was lost keeps every tie decision of the narrower format.
        let near = x as f32;
        if near.is_infinite() || near.is_nan() || f64::from(near) == x {
            return f16::from_f32(near);
        }
        let toward_zero = if f64::from(near).abs() > x.abs() { f32::from_bits(near.to_bits() - 1) } else { near };
        f16::from_f32(f32::from_bits(toward_zero.to_bits() | 1))
    }
}
