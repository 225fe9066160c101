//! The arithmetic of one warpgroup product: operands out of shared memory by descriptor, fragments, multiplication.

use super::async_access::Actor;
use super::warp::Warp;
use super::{Machine, Trouble, trouble};
use crate::isa::ty::{SHARED_BASE, Ty};
use crate::isa::wgmma::Product;
use crate::num;
use crate::options::Detector;
use crate::race;
use crate::report::Fault;
use crate::tensor_map::Swizzle;

/// Whose shared memory is read, and by whom.
pub(crate) struct Place<'a, 'c> {
    pub rank: usize,
    pub reader: &'a Actor<'c>,
    pub name: &'a str,
}

/// A decoded shared-memory descriptor. Byte units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub start: u32,
    /// Leading and stride byte offsets.
    pub leading: u32,
    pub stride: u32,
    pub swizzle: Swizzle,
}

impl Descriptor {
    pub fn decode(bits: u64) -> Result<Descriptor, Trouble> {
        let field = |shift: u32| ((bits >> shift) as u32 & 0x3fff) << 4;
        let base = bits >> 49 & 7;
        if base != 0 {
            return Err(trouble(Fault::Wgmma, format!("wgmma descriptor {bits:#018x}: base offset is {base}, only 0 is supported")));
        }
        let swizzle = match bits >> 62 {
            0 => Swizzle::None,
            1 => Swizzle::B128,
            2 => Swizzle::B64,
            _ => Swizzle::B32,
        };
        Ok(Descriptor { start: field(0), leading: field(16), stride: field(32), swizzle })
    }

    /// Shared address of a 16-byte chunk. K-major: `row` and chunk (0 or 1) along K. MN-major: `row` is k, the chunk counts along MN.
    pub fn chunk(self, mn_major: bool, row: u32, chunk: u32) -> u32 {
        let span = self.swizzle.span();
        let none = self.swizzle == Swizzle::None;
        let offset = match (mn_major, none) {
            (false, false) => (row / 8) * self.stride + (row % 8) * span + chunk * 16,
            (false, true) => (row / 8) * self.stride + (row % 8) * 16 + chunk * self.leading,
            (true, false) => {
                let per = span / 16;
                (row / 8) * self.stride + (row % 8) * span + (chunk % per) * 16 + (chunk / per) * self.leading
            }
            (true, true) => (row / 8) * self.leading + (row % 8) * 16 + chunk * self.stride,
        };
        self.swizzle.apply(self.start.wrapping_add(offset))
    }
}

/// Elements of one 16-byte chunk.
fn elements(ty: Ty, bytes: &[u8], out: &mut [f32], negate: bool) {
    let sign = if negate { -1.0 } else { 1.0 };
    match ty {
        Ty::BF16 | Ty::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                let code = u32::from(u16::from_le_bytes([b[0], b[1]]));
                *o = sign * if ty == Ty::BF16 { num::bf16(code) } else { num::f16(code) };
            }
        }
        _ => {
            let format = if ty == Ty::E4M3 { num::E4M3 } else { num::E5M2 };
            for (o, b) in out.iter_mut().zip(bytes) {
                *o = sign * format.decode((*b).into()) as f32;
            }
        }
    }
}

/// Reads an operand of `rows` (along M or N) by 32 bytes (along K), as `[rows][k]`.
pub(crate) fn operand(
    m: &mut Machine<'_>,
    place: &Place<'_, '_>,
    bits: u64,
    rows: usize,
    ty: Ty,
    mn_major: bool,
    negate: bool,
) -> Result<Vec<f32>, Trouble> {
    let d = Descriptor::decode(bits)?;
    let per = 16 / ty.bytes() as usize;
    let k = 2 * per;
    let mut out = vec![0f32; rows * k];
    let (outer, chunks) = if mn_major { (k, rows / per) } else { (rows, 2) };
    let mut values = [0f32; 16];
    for row in 0..outer {
        for chunk in 0..chunks {
            let address = d.chunk(mn_major, row as u32, chunk as u32);
            let shared = &m.ctas[place.rank].shared;
            let Some(offset) = shared.offset(address, 16) else {
                let at = i64::from(address) - i64::from(SHARED_BASE);
                let text = format!("out-of-bounds read by {} at shared window of {} bytes, offset {at}", place.name, shared.data.len());
                return Err(trouble(Fault::OutOfBounds, text));
            };
            let tag = shared.tags[offset / 128];
            if tag != 0 && tag != d.swizzle as u8 + 1 && m.has(Detector::Swizzle) {
                let written = Swizzle::from_driver(u32::from(tag) - 1).unwrap_or_default();
                let name = m.shared_name(place.rank, offset);
                let text = format!("descriptor says {} swizzle, but {name} was written by TMA with {written} swizzle", d.swizzle);
                return Err(trouble(Fault::SwizzleMismatch, text));
            }
            m.check_shared_init(place.name, place.rank, offset, 16)?;
            m.check_shared(place.reader, place.rank, offset, 16, race::READ)?;
            let bytes = &m.ctas[place.rank].shared.data[offset..offset + 16];
            elements(ty, bytes, &mut values[..per], negate);
            if mn_major {
                for (i, v) in values[..per].iter().enumerate() {
                    out[(chunk * per + i) * k + row] = *v;
                }
            } else {
                out[row * k + chunk * per..row * k + (chunk + 1) * per].copy_from_slice(&values[..per]);
            }
        }
    }
    Ok(out)
}

/// `[rows][k]` to `[k][rows]`.
pub(crate) fn transpose(v: &[f32], rows: usize, k: usize) -> Vec<f32> {
    let mut out = vec![0f32; v.len()];
    for r in 0..rows {
        for i in 0..k {
            out[i * rows + r] = v[r * k + i];
        }
    }
    out
}

/// `d[64][n] += a[64][k] * b[k][n]`, in ascending k, each step rounded to f32.
pub(crate) fn multiply(a: &[f32], b: &[f32], d: &mut [f32], n: usize, k: usize) {
    for (a, d) in a.chunks_exact(k).zip(d.chunks_exact_mut(n)) {
        for (c, d) in d.chunks_exact_mut(8).enumerate() {
            let mut sum: [f32; 8] = [d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7]];
            for (i, a) in a.iter().enumerate() {
                let b = &b[i * n + 8 * c..i * n + 8 * c + 8];
                for j in 0..8 {
                    sum[j] += a * b[j];
                }
            }
            d.copy_from_slice(&sum);
        }
    }
}

/// A from registers: register r of lane 4g+t of warp `member` holds row 16*member + g + 8*(r%2), columns 4*per*(r/2) + per*t + j.
pub(crate) fn a_registers(a: &mut [f32], w: &Warp, member: usize, base: u32, slots: &[u32], p: &Product) {
    let per = 4 / p.a_ty.bytes() as usize;
    let mut values = [0f32; 16];
    for (r, slot) in slots.iter().enumerate() {
        let row = &w.r32[(base + slot) as usize];
        for (l, v) in row.iter().enumerate() {
            elements(p.a_ty, &v.to_le_bytes(), &mut values[..per], p.negate_a);
            let at = (16 * member + l / 4 + 8 * (r % 2)) * p.k + 4 * per * (r / 2) + per * (l % 4);
            a[at..at + per].copy_from_slice(&values[..per]);
        }
    }
}

/// Row and column of element `i` of a lane's accumulators.
fn accumulator(member: usize, lane: usize, i: usize) -> (usize, usize) {
    (16 * member + lane / 4 + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * (lane % 4) + (i & 1))
}

pub(crate) fn load_accumulators(d: &mut [f32], w: &Warp, member: usize, base: u32, p: &Product) {
    for (r, slot) in p.d.iter().enumerate() {
        let row = &w.r32[(base + slot) as usize];
        for (l, v) in row.iter().enumerate() {
            if p.half {
                for h in 0..2 {
                    let (y, x) = accumulator(member, l, 2 * r + h);
                    d[y * p.n + x] = num::f16(v >> (16 * h) & 0xffff);
                }
            } else {
                let (y, x) = accumulator(member, l, r);
                d[y * p.n + x] = f32::from_bits(*v);
            }
        }
    }
}

pub(crate) fn store_accumulators(d: &[f32], w: &mut Warp, member: usize, base: u32, p: &Product) {
    for (r, slot) in p.d.iter().enumerate() {
        let row = &mut w.r32[(base + slot) as usize];
        for (l, v) in row.iter_mut().enumerate() {
            let value = |i: usize| {
                let (y, x) = accumulator(member, l, i);
                d[y * p.n + x]
            };
            *v = if p.half { num::to_f16(value(2 * r)) | num::to_f16(value(2 * r + 1)) << 16 } else { value(r).to_bits() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_of_the_worked_recipes() {
        // K-major, 128B, tile at 0x8000.
        let d = Descriptor::decode(0x4000_0040_0001_0800).unwrap();
        assert_eq!(d, Descriptor { start: 0x8000, leading: 16, stride: 1024, swizzle: Swizzle::B128 });
        assert_eq!(d.chunk(false, 0, 0), 0x8000);
        assert_eq!(d.chunk(false, 1, 0), 0x8000 + 128 + 16);
        assert_eq!(d.chunk(false, 9, 1), 0x8000 + 1024 + 128);
        // MN-major, 128B: panels 8192 bytes apart.
        let d = Descriptor::decode(0x4000_0040_0200_0c00).unwrap();
        assert_eq!(d.chunk(true, 8, 8), 0xc000 + 8192 + 1024);
        assert!(Descriptor::decode(1 << 49).is_err());
    }
}
