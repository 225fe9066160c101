//! The arithmetic of one warpgroup product: operands out of shared memory by descriptor, fragments, multiplication.

use super::async_access::Actor;
use super::warp::{L32, Warp};
use super::{Machine, Trouble, trouble};
use crate::isa::ty::{SHARED_BASE, Ty};
use crate::isa::wgmma::{Product, Sum};
use crate::num;
use crate::options::Detector;
use crate::race::{self, cells::Sweep};
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
        // Without a swizzle the field has no meaning.
        if base != 0 && bits >> 62 != 0 {
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

    /// How many chunks of a row lie in one aligned piece, which the swizzle only reorders.
    fn line(self, mn_major: bool) -> usize {
        let chunks = match (mn_major, self.swizzle) {
            (_, Swizzle::None) => 1,
            (false, _) => 2,
            (true, swizzle) => swizzle.span() / 16,
        };
        let leading = if mn_major { self.leading } else { 0 };
        if (self.start | self.stride | leading).is_multiple_of(16 * chunks) { chunks as usize } else { 1 }
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
        Ty::TF32 => {
            // The tensor core reads the upper 19 bits.
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_bits(u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & 0xffff_e000);
            }
        }
        Ty::S8 => out.iter_mut().zip(bytes).for_each(|(o, b)| *o = f32::from(*b as i8)),
        Ty::U8 => out.iter_mut().zip(bytes).for_each(|(o, b)| *o = f32::from(*b)),
        _ => {
            let format = if ty == Ty::E4M3 { num::E4M3 } else { num::E5M2 };
            for (o, b) in out.iter_mut().zip(bytes) {
                *o = format.decode((*b).into()) as f32;
            }
        }
    }
}

/// Checks a range that a product reads. Gives its offset in the window.
fn inspect(
    m: &mut Machine<'_>,
    place: &Place<'_, '_>,
    d: Descriptor,
    address: u32,
    len: usize,
    sweep: &mut Option<Sweep<'_>>,
) -> Result<usize, Trouble> {
    let shared = &m.ctas[place.rank].shared;
    let Some(offset) = shared.offset(address, len as u32) else {
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
    m.check_shared_init(place.name, place.rank, offset, len)?;
    if let Some(sweep) = sweep {
        m.sweep_shared(place.reader, place.rank, offset, len, sweep)?;
    }
    Ok(offset)
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
    let line = d.line(mn_major);
    let mut sweep = m.clocks.on().then(|| m.sweep(place.reader, race::READ));
    let mut values = [0f32; 16];
    for row in 0..outer {
        for first in (0..chunks).step_by(line) {
            let n = line.min(chunks - first);
            // A whole line is looked at in one piece; what is wrong with it is said of its first wrong chunk.
            let low = d.chunk(mn_major, row as u32, first as u32) & !(16 * line as u32 - 1);
            let shared = &m.ctas[place.rank].shared;
            let sound = |offset: &usize| !m.check_init || shared.uninitialised(*offset, 16 * line).is_none();
            let whole = n == line && shared.offset(low, 16 * line as u32).filter(sound).is_some();
            if whole {
                inspect(m, place, d, low, 16 * line, &mut sweep)?;
            }
            for chunk in first..first + n {
                let address = d.chunk(mn_major, row as u32, chunk as u32);
                if !whole {
                    inspect(m, place, d, address, 16, &mut sweep)?;
                }
                let offset = (address - SHARED_BASE) as usize;
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

/// The 16 rows of warp `member`: `D = A * B`, or with `scale_d` plus what the accumulators hold. K ascends; every step rounds to f32.
pub(crate) fn multiply<const K: usize>(w: &mut Warp, member: usize, base: u32, p: &Product, a: &[f32], b: &[[f32; 8]], scale_d: bool) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn wide<const K: usize>(w: &mut Warp, member: usize, base: u32, p: &Product, a: &[f32], b: &[[f32; 8]], scale_d: bool) {
            sixteen_rows::<K>(w, member, base, p, a, b, scale_d);
        }
        // SAFETY: the processor has AVX2.
        #[allow(unsafe_code)]
        return unsafe { wide::<K>(w, member, base, p, a, b, scale_d) };
    }
    sixteen_rows::<K>(w, member, base, p, a, b, scale_d);
}

/// [`multiply`] with whatever vectors its caller is compiled for; the results are the same.
#[inline(always)]
fn sixteen_rows<const K: usize>(w: &mut Warp, member: usize, base: u32, p: &Product, a: &[f32], b: &[[f32; 8]], scale_d: bool) {
    for (c, panel) in b.chunks_exact(K).enumerate() {
        let slot = |i: usize| (base + p.d[i]) as usize;
        for h in 0..2 {
            let a = &a[(16 * member + 8 * h) * K..][..8 * K];
            if let Sum::S32 { satfinite } = p.sum {
                // 32 products of two bytes are exact in f32.
                let (e, o) = (slot(4 * c + 2 * h), slot(4 * c + 2 * h + 1));
                let (mut even, mut odd) = ([0; 32], [0; 32]);
                eight_rows::<K>(&mut even, &mut odd, a, panel, false);
                for (at, sums) in [(e, even), (o, odd)] {
                    for (old, sum) in w.r32[at].iter_mut().zip(sums) {
                        let (before, sum) = (if scale_d { *old as i32 } else { 0 }, f32::from_bits(sum) as i32);
                        *old = if satfinite { before.saturating_add(sum) } else { before.wrapping_add(sum) } as u32;
                    }
                }
            } else if p.sum == Sum::F16 {
                // A register holds an even and an odd column.
                let at = slot(2 * c + h);
                let mut even: L32 = std::array::from_fn(|l| num::f16(w.r32[at][l] & 0xffff).to_bits());
                let mut odd: L32 = std::array::from_fn(|l| num::f16(w.r32[at][l] >> 16).to_bits());
                eight_rows::<K>(&mut even, &mut odd, a, panel, scale_d);
                let half = |bits: u32| num::to_f16(f32::from_bits(bits));
                w.r32[at] = std::array::from_fn(|l| half(even[l]) | half(odd[l]) << 16);
            } else {
                let (e, o) = (slot(4 * c + 2 * h), slot(4 * c + 2 * h + 1));
                let (mut even, mut odd) = (w.r32[e], w.r32[o]);
                eight_rows::<K>(&mut even, &mut odd, a, panel, scale_d);
                (w.r32[e], w.r32[o]) = (even, odd);
            }
        }
    }
}

/// Eight rows by eight columns, as they lie in two registers: lane 4g+t holds row g of columns 2t (even) and 2t+1 (odd). Four rows at a
/// time, because their sums fit in registers.
#[inline(always)]
fn eight_rows<const K: usize>(even: &mut L32, odd: &mut L32, a: &[f32], panel: &[[f32; 8]], scale_d: bool) {
    for q in 0..2 {
        let rows: [&[f32]; 4] = std::array::from_fn(|j| &a[(4 * q + j) * K..][..K]);
        let mut sum = [[0f32; 8]; 4];
        if scale_d {
            for (j, sum) in sum.iter_mut().enumerate() {
                for t in 0..4 {
                    let lane = 16 * q + 4 * j + t;
                    (sum[t], sum[4 + t]) = (f32::from_bits(even[lane]), f32::from_bits(odd[lane]));
                }
            }
        }
        for (i, b) in panel[..K].iter().enumerate() {
            for j in 0..4 {
                let a = rows[j][i];
                for x in 0..8 {
                    sum[j][x] += a * b[x];
                }
            }
        }
        for (j, sum) in sum.iter().enumerate() {
            for t in 0..4 {
                let lane = 16 * q + 4 * j + t;
                (even[lane], odd[lane]) = (sum[t].to_bits(), sum[4 + t].to_bits());
            }
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
        assert!(Descriptor::decode(1 << 62 | 1 << 49).is_err());
        assert_eq!(Descriptor::decode(7 << 49).unwrap(), Descriptor::decode(0).unwrap());
    }
}
