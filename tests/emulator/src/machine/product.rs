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

/// Elements of a few bytes.
#[inline(always)]
fn elements(ty: Ty, bytes: &[u8], out: &mut [f32]) {
    match ty {
        Ty::BF16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = num::bf16(u16::from_le_bytes([b[0], b[1]]).into());
            }
        }
        Ty::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = num::f16(u16::from_le_bytes([b[0], b[1]]).into());
            }
        }
        _ => {
            let format = if ty == Ty::E4M3 { num::E4M3 } else { num::E5M2 };
            for (o, b) in out.iter_mut().zip(bytes) {
                *o = format.decode((*b).into()) as f32;
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
    let (check_swizzle, check_races) = (m.has(Detector::Swizzle), m.clocks.on());
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
            if check_swizzle && tag != 0 && tag != d.swizzle as u8 + 1 {
                let written = Swizzle::from_driver(u32::from(tag) - 1).unwrap_or_default();
                let name = m.shared_name(place.rank, offset);
                let text = format!("descriptor says {} swizzle, but {name} was written by TMA with {written} swizzle", d.swizzle);
                return Err(trouble(Fault::SwizzleMismatch, text));
            }
            m.check_shared_init(place.name, place.rank, offset, 16)?;
            if check_races {
                m.check_shared(place.reader, place.rank, offset, 16, race::READ)?;
            }
            let bytes = &m.ctas[place.rank].shared.data[offset..offset + 16];
            if mn_major {
                elements(ty, bytes, &mut values[..per]);
                for (i, v) in values[..per].iter().enumerate() {
                    out[(chunk * per + i) * k + row] = *v;
                }
            } else {
                elements(ty, bytes, &mut out[row * k + chunk * per..row * k + (chunk + 1) * per]);
            }
        }
    }
    if negate {
        out.iter_mut().for_each(|v| *v = -*v);
    }
    Ok(out)
}

/// A from registers: register r of lane 4g+t of warp `member` holds row 16*member + g + 8*(r%2), columns 4*per*(r/2) + per*t + j.
pub(crate) fn a_registers(a: &mut [f32], w: &Warp, member: usize, base: u32, slots: &[u32], p: &Product) {
    let per = 4 / p.a_ty.bytes() as usize;
    for (r, slot) in slots.iter().enumerate() {
        let row = &w.r32[(base + slot) as usize];
        for (l, v) in row.iter().enumerate() {
            let at = (16 * member + l / 4 + 8 * (r % 2)) * p.k + 4 * per * (r / 2) + per * (l % 4);
            elements(p.a_ty, &v.to_le_bytes(), &mut a[at..at + per]);
            if p.negate_a {
                a[at..at + per].iter_mut().for_each(|v| *v = -*v);
            }
        }
    }
}

/// Column of a panel's eight that stands at each place: even columns first, because one accumulator register of four neighbouring
/// lanes holds four of them.
const COLUMNS: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// `[n][k]` to panels of eight columns: `panels[n / 8 * k + i]`.
pub(crate) fn panels(b: &[f32], n: usize, k: usize) -> Vec<[f32; 8]> {
    let mut out = vec![[0f32; 8]; n / 8 * k];
    for (c, panel) in out.chunks_exact_mut(k).enumerate() {
        for (x, column) in COLUMNS.iter().enumerate() {
            let row = &b[(8 * c + column) * k..][..k];
            for (to, v) in panel.iter_mut().zip(row) {
                to[x] = *v;
            }
        }
    }
    out
}

/// The accumulators of panel `c`, row half `h`: even and odd columns of all lanes.
fn load(w: &Warp, base: u32, p: &Product, c: usize, h: usize) -> [[f32; 32]; 2] {
    let row = |i: usize| &w.r32[(base + p.d[i]) as usize];
    if p.half {
        let pairs = row(2 * c + h);
        return [pairs.map(|v| num::f16(v & 0xffff)), pairs.map(|v| num::f16(v >> 16))];
    }
    [row(4 * c + 2 * h).map(f32::from_bits), row(4 * c + 2 * h + 1).map(f32::from_bits)]
}

fn store(w: &mut Warp, base: u32, p: &Product, c: usize, h: usize, v: &[[f32; 32]; 2]) {
    let row = |i: usize| (base + p.d[i]) as usize;
    if p.half {
        w.r32[row(2 * c + h)] = std::array::from_fn(|l| num::to_f16(v[0][l]) | num::to_f16(v[1][l]) << 16);
        return;
    }
    w.r32[row(4 * c + 2 * h)] = v[0].map(f32::to_bits);
    w.r32[row(4 * c + 2 * h + 1)] = v[1].map(f32::to_bits);
}

/// The 16 rows of warp `member`: `D = A * B`, or with `scale_d` plus what the accumulators hold. K ascends; every step rounds to f32.
pub(crate) fn multiply<const K: usize>(w: &mut Warp, member: usize, base: u32, p: &Product, a: &[f32], b: &[[f32; 8]], scale_d: bool) {
    for (c, panel) in b.chunks_exact(K).enumerate() {
        for h in 0..2 {
            let mut d = if scale_d { load(w, base, p, c, h) } else { [[0f32; 32]; 2] };
            // Lane 4g+t holds row g: four rows are 16 neighbouring lanes.
            for q in 0..2 {
                let first = (16 * member + 8 * h + 4 * q) * K;
                let rows: [&[f32]; 4] = std::array::from_fn(|j| &a[first + j * K..first + (j + 1) * K]);
                let mut sum: [[f32; 8]; 4] = std::array::from_fn(|j| std::array::from_fn(|x| d[x / 4][16 * q + 4 * j + x % 4]));
                for i in 0..K {
                    let b = &panel[i];
                    for j in 0..4 {
                        let a = rows[j][i];
                        for x in 0..8 {
                            sum[j][x] += a * b[x];
                        }
                    }
                }
                for (j, sum) in sum.iter().enumerate() {
                    for (x, v) in sum.iter().enumerate() {
                        d[x / 4][16 * q + 4 * j + x % 4] = *v;
                    }
                }
            }
            store(w, base, p, c, h, &d);
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
