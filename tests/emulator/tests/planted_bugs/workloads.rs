//! The smallest launch of each kernel that reaches every branch, with inputs whose results are exact.

use crate::cases::number::{E4M3, Mode};
use crate::cases::{Arg, Case, Element, Expect, Format, Swizzle, TensorMap, Want, bf16s, f32s, scrambled, u32s, u64s};

/// Every kernel of the folder, clean.
pub fn all() -> Vec<Case> {
    vec![
        gating(),
        permute(),
        gemm(),
        cluster_gemm(),
        gather_gemm(),
        tile_product(),
        tma_store(),
        vector_copy(),
        local_array(),
        block_sum(),
        warp_pairs(),
        named_barriers(),
        block_total(),
        last_block(),
        abi_echo(),
        pipelined_gemm(),
        fp8_gemm(),
        attention_tile(),
        warp_gemm(),
        math(),
        persistent_gemm(),
    ]
}

/// Five tokens in six warps.
pub fn gating() -> Case {
    let (tokens, experts, top_k) = (5, 32, 4);
    let mut logits: Vec<f32> = scrambled(tokens * experts, 1, 40).iter().map(|x| x / 8.0).collect();
    // Ties between lanes near and far.
    (logits[3], logits[20], logits[32 + 9], logits[32 + 10]) = (9.0, 9.0, 8.5, 8.5);
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    for row in logits.chunks(experts) {
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        let powers: Vec<f64> = order[..top_k].iter().map(|&e| f64::from(row[e] - row[order[0]]).exp()).collect();
        ids.extend(order[..top_k].iter().map(|&e| e as u32));
        weights.extend(powers.iter().map(|p| Want::Near { value: p / powers.iter().sum::<f64>(), relative: 1e-5, absolute: 0.0 }));
    }
    let args = vec![
        Arg::input(f32s(&logits)),
        Arg::output(u32s(&ids)),
        Arg::values(Format::F32, weights),
        Arg::U32(tokens as u32),
        Arg::U32(top_k as u32),
    ];
    Case::kernel("gating", [2, 1, 1], 96, args)
}

pub fn permute() -> Case {
    let (slots, experts) = (200, 8);
    let ids: Vec<u32> = scrambled(slots, 2, 5).iter().map(|x| (x.abs() as u32 * 3 + 1) % experts).collect();
    let mut offsets = vec![0; experts as usize + 1];
    for e in 0..experts as usize {
        offsets[e + 1] = offsets[e] + ids.iter().filter(|&&id| id == e as u32).count() as u32;
    }
    let (want_offsets, want_ids) = (offsets.clone(), ids.clone());
    let judge = move |got: &[u8]| {
        let rows: Vec<u32> = got.chunks(4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes"))).collect();
        let mut taken = vec![false; slots];
        for (slot, &row) in rows.iter().enumerate() {
            let e = want_ids[slot] as usize;
            if row < want_offsets[e] || row >= want_offsets[e + 1] {
                return Some(format!("slot {slot} of expert {e} is in row {row}, not in {}..{}", want_offsets[e], want_offsets[e + 1]));
            }
            if std::mem::replace(&mut taken[row as usize], true) {
                return Some(format!("row {row} is given twice"));
            }
        }
        None
    };
    let args = vec![
        Arg::input(u32s(&ids)),
        Arg::output(u32s(&offsets)),
        Arg::Buffer { before: vec![0xD5; 4 * slots], after: Expect::Judge(Box::new(judge)) },
        Arg::U32(slots as u32),
        Arg::U32(experts),
    ];
    Case::kernel("permute", [1, 1, 1], 128, args)
}

/// x[m, k] * w[n, k]^T in f64, exact for small integers.
fn product(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    x.chunks(k).flat_map(|row| w.chunks(k).map(|column| row.iter().zip(column).map(|(a, b)| a * b).sum())).collect()
}

/// A bf16 matrix of `rows` x `k` read in boxes of `tile_rows` x 64.
fn map(of: usize, dims: &[u64], tile_rows: u32) -> Arg {
    let mut strides = Vec::new();
    let mut bytes = 2;
    for dim in &dims[..dims.len() - 1] {
        bytes *= dim;
        strides.push(bytes);
    }
    let mut tile = vec![1; dims.len()];
    (tile[0], tile[1]) = (64, tile_rows);
    Arg::Map(TensorMap { of, element: Element::Bf16, dims: dims.to_vec(), strides, tile, swizzle: Swizzle::B128 })
}

/// Three experts with 40, 0 and 24 rows; two column tiles; four steps through two stages.
pub fn gemm() -> Case {
    let (k, n, experts, rows) = (256, 128, 3, 64);
    let offsets = [0u32, 40, 40, 64];
    let x = scrambled(rows * k, 3, 4);
    let w = scrambled(experts * n * k, 4, 4);
    let mut y = Vec::new();
    for e in 0..experts {
        y.extend(product(&x[offsets[e] as usize * k..offsets[e + 1] as usize * k], &w[e * n * k..(e + 1) * n * k], k));
    }
    let args = vec![
        map(6, &[k as u64, rows as u64], 64),
        map(7, &[k as u64, n as u64, experts as u64], 64),
        Arg::input(u32s(&offsets)),
        Arg::output(f32s(&y)),
        Arg::U32(n as u32),
        Arg::U32(k as u32 / 64),
        Arg::input(bf16s(&x)),
        Arg::input(bf16s(&w)),
    ];
    Case { params: 6, ..Case::kernel("gemm", [2, 3, 1], 256, args) }.shared(2 * 16384 + 32)
}

/// 100 rows in one pair of row tiles; two column tiles; five steps through three stages.
pub fn cluster_gemm() -> Case {
    let (k, n, rows) = (320, 128, 100);
    let (x, w) = (scrambled(rows * k, 5, 4), scrambled(n * k, 6, 4));
    let args = vec![
        map(6, &[k as u64, rows as u64], 64),
        map(7, &[k as u64, n as u64], 32),
        Arg::output(f32s(&product(&x, &w, k))),
        Arg::U32(rows as u32),
        Arg::U32(n as u32),
        Arg::U32(k as u32 / 64),
        Arg::input(bf16s(&x)),
        Arg::input(bf16s(&w)),
    ];
    Case { params: 6, ..Case::kernel("cluster_gemm", [2, 2, 1], 160, args) }.shared(3 * 16384 + 48)
}

/// 64 rows gathered from ten tokens, some missing; three steps through two stages.
pub fn gather_gemm() -> Case {
    let (k, n, tokens) = (192, 64, 10);
    let (x, w) = (scrambled(tokens * k, 7, 4), scrambled(n * k, 8, 4));
    let token: Vec<i32> = (0..64).map(|row| if row % 9 == 4 { -1 } else { (row * 7 + 3) % tokens as i32 }).collect();
    let gathered: Vec<f32> = token.iter().flat_map(|&t| if t < 0 { vec![0.0; k] } else { x[t as usize * k..][..k].to_vec() }).collect();
    let args = vec![
        map(6, &[k as u64, n as u64], 64),
        Arg::input(bf16s(&x)),
        Arg::input(u32s(&token.iter().map(|&t| t as u32).collect::<Vec<_>>())),
        Arg::output(f32s(&product(&gathered, &w, k))),
        Arg::U32(n as u32),
        Arg::U32(k as u32 / 64),
        Arg::input(bf16s(&w)),
    ];
    Case { params: 6, ..Case::kernel("gather_gemm", [1, 1, 1], 256, args) }.shared(2 * 16384 + 32)
}

pub fn tile_product() -> Case {
    let (a, b) = (scrambled(64 * 64, 9, 4), scrambled(64 * 64, 10, 4));
    let args = vec![Arg::input(bf16s(&a)), Arg::input(bf16s(&b)), Arg::output(f32s(&product(&a, &b, 64)))];
    Case::kernel("tile_product", [1, 1, 1], 128, args)
}

/// 100 rows: the last of four tiles is mostly outside.
pub fn tma_store() -> Case {
    let rows = 100;
    let x = scrambled(rows * 32, 11, 1000);
    let y: Vec<f32> = x.iter().map(|v| 2.0 * v).collect();
    let tile = TensorMap {
        of: 3,
        element: Element::F32,
        dims: vec![32, rows as u64],
        strides: vec![128],
        tile: vec![32, 32],
        swizzle: Swizzle::None,
    };
    let args = vec![Arg::Map(tile), Arg::input(f32s(&x)), Arg::U32(rows as u32), Arg::output(f32s(&y))];
    Case { params: 3, ..Case::kernel("tma_store", [2, 1, 1], 128, args) }
}

pub fn vector_copy() -> Case {
    let x = scrambled(260, 12, 1000);
    let args = vec![Arg::input(f32s(&x)), Arg::output(f32s(&x[..256])), Arg::U32(256)];
    Case::kernel("vector_copy", [2, 1, 1], 64, args)
}

/// Keys up to 8: the clean kernel counts an 8 as a 0.
pub fn local_array() -> Case {
    let keys: Vec<u32> = scrambled(32 * 16, 13, 8).iter().map(|x| x.abs() as u32).collect();
    let mut counts = vec![0u32; 32 * 8];
    for (i, key) in keys.iter().enumerate() {
        counts[i / 16 * 8 + (key % 8) as usize] += 1;
    }
    Case::kernel("local_array", [1, 1, 1], 32, vec![Arg::input(u32s(&keys)), Arg::output(u32s(&counts))])
}

/// The second of two blocks is partly past the end, in the middle of a warp.
pub fn block_sum() -> Case {
    block_sum_of(200)
}

pub fn block_sum_of(n: usize) -> Case {
    let x: Vec<u32> = scrambled(n, 14, 1000).iter().map(|x| x.abs() as u32).collect();
    let sums = [x[..128].iter().sum(), x[128..].iter().sum()];
    Case::kernel("block_sum", [2, 1, 1], 128, vec![Arg::input(u32s(&x)), Arg::output(u32s(&sums)), Arg::U32(n as u32)])
}

pub fn warp_pairs() -> Case {
    let x: Vec<u32> = scrambled(128, 15, 1000).iter().map(|x| x.abs() as u32).collect();
    let y: Vec<u32> = (0..128).map(|i| x[i] + 10 * x[i ^ 1] + 100 * x[i ^ 8]).collect();
    Case::kernel("warp_pairs", [2, 1, 1], 64, vec![Arg::input(u32s(&x)), Arg::output(u32s(&y))])
}

pub fn named_barriers() -> Case {
    let x: Vec<u32> = (0..192).map(|i| i * i + 1).collect();
    let y: Vec<u32> = x.iter().map(|v| 3 * v).collect();
    Case::kernel("named_barriers", [1, 1, 1], 128, vec![Arg::input(u32s(&x)), Arg::output(u32s(&y)), Arg::U32(3)])
}

pub fn block_total() -> Case {
    let x: Vec<u32> = (0..128).map(|i| i * 3 + 1).collect();
    let total = Arg::Buffer { before: u32s(&[0]), after: Expect::Bytes(u32s(&[x.iter().sum()])) };
    Case::kernel("block_total", [4, 1, 1], 32, vec![Arg::input(u32s(&x)), total])
}

pub fn last_block() -> Case {
    let x: Vec<u32> = (0..128).map(|i| i * i + 7).collect();
    let partial: Vec<u32> = x.chunks(32).map(|block| block.iter().sum()).collect();
    let finished = Arg::Buffer { before: u32s(&[0]), after: Expect::Bytes(u32s(&[4])) };
    let args = vec![Arg::input(u32s(&x)), Arg::output(u32s(&partial)), finished, Arg::output(u32s(&[x.iter().sum()]))];
    Case::kernel("last_block", [4, 1, 1], 32, args)
}

/// A matrix of two dimensions in boxes of 128 bytes by `tile_rows`, for elements of any width.
fn panel(of: usize, element: Element, dims: [u64; 2], tile_rows: u32) -> Arg {
    let width = element.bytes();
    let tile = vec![128 / width as u32, tile_rows];
    Arg::Map(TensorMap { of, element, dims: dims.to_vec(), strides: vec![dims[0] * width as u64], tile, swizzle: Swizzle::B128 })
}

fn transposed(matrix: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| matrix.iter().skip(c).step_by(columns).copied()).collect()
}

/// 200 rows in two tiles of 128, two column tiles, five steps through three stages; the result is rounded to bf16.
pub fn pipelined_gemm() -> Case {
    let (k, n, rows) = (320, 128, 200);
    let (x, w) = (scrambled(rows * k, 16, 4), scrambled(k * n, 17, 4));
    let y = product(&x, &transposed(&w, n), k).iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect::<Vec<_>>();
    let args = vec![
        panel(4, Element::Bf16, [k as u64, rows as u64], 128),
        panel(5, Element::Bf16, [n as u64, k as u64], 64),
        panel(6, Element::Bf16, [n as u64, rows as u64], 64),
        Arg::U32(k as u32 / 64),
        Arg::input(bf16s(&x)),
        Arg::input(bf16s(&w)),
        Arg::output(y),
    ];
    Case { params: 4, ..Case::kernel("pipelined_gemm", [2, 2, 1], 288, args) }.shared(3 * 24576 + 16384 + 48)
}

/// 300 rows in two pairs of row tiles, the last of them empty; one column tile; one cluster takes both, two steps each.
pub fn persistent_gemm() -> Case {
    let (k, n, rows) = (128, 256, 300);
    let (x, w) = (scrambled(rows * k, 30, 4), scrambled(n * k, 31, 4));
    let y = product(&x, &w, k).iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect::<Vec<_>>();
    let args = vec![
        panel(6, Element::Bf16, [k as u64, rows as u64], 128),
        panel(7, Element::Bf16, [k as u64, n as u64], 128),
        panel(8, Element::Bf16, [n as u64, rows as u64], 64),
        Arg::U32(2),
        Arg::U32(1),
        Arg::U32(k as u32 / 64),
        Arg::input(bf16s(&x)),
        Arg::input(bf16s(&w)),
        Arg::output(y),
    ];
    Case { params: 6, ..Case::kernel("persistent_gemm", [2, 1, 1], 384, args) }.shared(3 * 49152 + 65536 + 48)
}

/// e4m3 bytes of small integers.
fn e4m3s(values: &[f32]) -> Vec<u8> {
    values.iter().map(|&v| E4M3.round(v.into(), Mode::Rn).expect("a number") as u8).collect()
}

/// Three blocks of k with a scale per row, powers of two.
pub fn fp8_gemm() -> Case {
    let (k, n, rows) = (384, 64, 64);
    let (x, w) = (scrambled(rows * k, 18, 4), scrambled(n * k, 19, 4));
    let scale: Vec<f32> = scrambled(k / 128 * rows, 20, 3).iter().map(|&e| e.exp2()).collect();
    let scaled: Vec<f32> = x.iter().enumerate().map(|(i, v)| v * scale[i % k / 128 * rows + i / k]).collect();
    let args = vec![
        panel(7, Element::U8, [k as u64, rows as u64], 64),
        panel(8, Element::U8, [k as u64, n as u64], 64),
        Arg::input(f32s(&scale)),
        Arg::output(f32s(&product(&scaled, &w, k))),
        Arg::U32(rows as u32),
        Arg::U32(n as u32),
        Arg::U32(k as u32 / 128),
        Arg::input(e4m3s(&x)),
        Arg::input(e4m3s(&w)),
    ];
    Case { params: 7, ..Case::kernel("fp8_gemm", [1, 1, 1], 160, args) }.shared(2 * 17408 + 32)
}

/// Two blocks of keys. Weights are rounded to bf16 before the second product, hence the tolerance.
pub fn attention_tile() -> Case {
    let keys = 128;
    let tame = |count: usize, seed: u64| scrambled(count, seed, 4).iter().map(|x| x / 4.0).collect::<Vec<f32>>();
    let (q, k, v) = (tame(64 * 64, 23), tame(keys * 64, 24), tame(keys * 64, 25));
    let mut o = Vec::new();
    for row in q.chunks(64) {
        let scores: Vec<f64> = k.chunks(64).map(|key| row.iter().zip(key).map(|(a, b)| f64::from(a * b)).sum()).collect();
        let top = scores.iter().copied().fold(f64::MIN, f64::max);
        let powers: Vec<f64> = scores.iter().map(|s| (s - top).exp2()).collect();
        let sum: f64 = powers.iter().sum();
        for d in 0..64 {
            let value = powers.iter().zip(v.chunks(64)).map(|(p, row)| p * f64::from(row[d])).sum::<f64>() / sum;
            o.push(Want::Near { value, relative: 0.01, absolute: 0.01 });
        }
    }
    let args = vec![
        panel(5, Element::Bf16, [64, 64], 64),
        panel(6, Element::Bf16, [64, keys as u64], 64),
        panel(7, Element::Bf16, [64, keys as u64], 64),
        Arg::values(Format::F32, o),
        Arg::U32(keys as u32 / 64),
        Arg::input(bf16s(&q)),
        Arg::input(bf16s(&k)),
        Arg::input(bf16s(&v)),
    ];
    Case { params: 5, ..Case::kernel("attention_tile", [1, 1, 1], 128, args) }.shared(3 * 8192 + 8)
}

/// Three steps through two buffers.
pub fn warp_gemm() -> Case {
    let k = 96;
    let (x, w) = (scrambled(64 * k, 26, 4), scrambled(32 * k, 27, 4));
    let args = vec![Arg::input(bf16s(&x)), Arg::input(bf16s(&w)), Arg::output(f32s(&product(&x, &w, k))), Arg::U32(k as u32 / 32)];
    Case::kernel("warp_gemm", [1, 1, 1], 128, args)
}

/// The error function by Simpson's rule.
fn erf(x: f64) -> f64 {
    let (steps, f) = (4000, |t: f64| (-t * t).exp());
    let h = x / f64::from(steps);
    let inner: f64 = (1..steps).map(|i| f(h * f64::from(i)) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    (f(0.0) + inner + f(x)) * h / 3.0 * std::f64::consts::FRAC_2_SQRT_PI
}

/// Arguments between -16 and 16 in steps of an eighth.
pub fn math() -> Case {
    let n = 64;
    let x: Vec<f32> = scrambled(n, 28, 128).iter().map(|v| v / 8.0).collect();
    let z: Vec<f32> = scrambled(n, 29, 100).iter().map(|v| v / 16.0 + if *v >= 0.0 { 0.0625 } else { 0.0 }).collect();
    let u: Vec<u64> = (1..=n as u64).map(|i| i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (i % 50)).collect();
    let (mut f, mut d, mut integers) = (Vec::new(), Vec::new(), Vec::new());
    for t in 0..n {
        let (xf, zf) = (x[t], z[t]);
        let (a, b) = (f64::from(xf), f64::from(zf));
        let singles = [
            a.exp(),
            a.exp2(),
            a.exp_m1(),
            a.abs().ln(),
            a.abs().log2(),
            a.abs().ln_1p(),
            a.sin(),
            a.cos(),
            f64::from(xf * 1.0e6).sin(),
            a.tanh(),
            a.sinh(),
            a.atan2(b),
            f64::from(xf / (xf.abs() + 1.0)).acos(),
            erf(a),
            a.abs().powf(b),
            a.cbrt(),
            1.0 / a.abs().sqrt(),
            a.abs().sqrt(),
            a % b,
            a.floor() + b.ceil() + a.trunc() + b.round_ties_even() + a.round(),
            a * 32.0 + b.copysign(a),
            a / b,
            (a - b).max(0.0) + a.max(b) - a.min(b),
            1.0 / b + a * b + a + b,
        ];
        f.extend(singles.map(|value| Want::Near { value, relative: 2e-6, absolute: 2e-6 }));
        let doubles = [
            a.exp(),
            a.abs().ln(),
            a.sin(),
            a.abs().powf(b),
            a / b,
            a.abs().sqrt(),
            1.0 / a.abs().sqrt(),
            a % b,
            erf(a),
            a.floor() + b.round_ties_even(),
        ];
        d.extend(doubles.map(|value| Want::Near { value, relative: 1e-11, absolute: 1e-14 }));

        let (u, v) = (u[t], u[t ^ 1] | 1);
        let (s, r) = (u as i64, v as i64);
        let (w, q) = (u as u32, u as u32 >> 7 | 1);
        let bytes = (u64::from(q) << 32 | u64::from(w)).to_le_bytes();
        let dot: i32 = w.to_le_bytes().iter().zip(q.to_le_bytes()).map(|(&a, b)| i32::from(a as i8) * i32::from(b as i8)).sum();
        let as_u64 = |x: i32| i64::from(x) as u64;
        integers.extend([
            u / v,
            u % v,
            (s / (r >> 20 | 1)) as u64,
            (s % (r >> 20 | 1)) as u64,
            (w / q + w % q).into(),
            u / 10 + u % 1000,
            as_u64(w as i32 / 7 + w as i32 % 24),
            u64::from(((u64::from(w) * u64::from(q)) >> 32) as u32).wrapping_add(((u128::from(u) * u128::from(v)) >> 64) as u64),
            u64::from(u.leading_zeros() * 64 + u.count_ones() + if u == 0 { 0 } else { u.trailing_zeros() + 1 } * 4096),
            u64::from(w.reverse_bits()).wrapping_add(u.reverse_bits()),
            u64::from(
                u32::from_le_bytes([bytes[6], bytes[4], bytes[1], bytes[5]])
                    ^ ((u64::from(q) << 32 | u64::from(w)) << (w & 31) >> 32) as u32,
            ),
            u << (w & 63) | u >> (w & 31),
            u64::from((dot + 5) as u32),
            (xf * 1.0e9) as i64 as u64,
            (a * 1.0e15) as i64 as u64,
            u64::from((xf.round_ties_even() as i32).wrapping_add(zf.to_bits() as i32) as u32),
        ]);
    }
    let args = vec![
        Arg::input(f32s(&x)),
        Arg::input(f32s(&z)),
        Arg::input(u64s(&u)),
        Arg::values(Format::F32, f),
        Arg::values(Format::F64, d),
        Arg::output(u64s(&integers)),
    ];
    Case::kernel("math", [2, 1, 1], 32, args)
}

/// Every field has a value of its own.
pub fn abi_echo() -> Case {
    let mut want: Vec<u64> = (0..16).map(|i| 0x1111_2222_3333_0000 + i).collect();
    let mut args: Vec<Arg> = want.iter().map(|&word| Arg::U64(word)).collect();
    want.extend([101, 202, 303, 2.5f32.to_bits().into(), -4i64 as u64, 505, 66, 168]);
    args.push(Arg::output(u64s(&want)));
    args.extend([
        Arg::U32(101),
        Arg::U32(202),
        Arg::U32(303),
        Arg::U32(2.5f32.to_bits()),
        Arg::U64(-4i64 as u64),
        Arg::U16(505),
        Arg::U8(66),
    ]);
    Case::kernel("abi_echo", [1, 1, 1], 1, args)
}
