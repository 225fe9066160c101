//! Registers read before anything wrote them.
//!
//! Each register of a frame has a mask of the lanes in which it is written. All lanes count as written from the start, but for the few
//! registers that the image's control flow leaves in doubt ([`unwritten`]): so only instructions that touch one of those are looked at.
//! A copy (`mov`, `selp`) of an unwritten register is unwritten and no fault, because compilers emit such copies for values that no path
//! uses. Every other read is one.

use super::warp::Warp;
use super::{Machine, Trouble, trouble};
use crate::front::unwritten;
use crate::isa::compare::Compare;
use crate::isa::ty::PSrc;
use crate::isa::wgmma::Wgmma;
use crate::isa::{Code, Op};
use crate::module::Row;
use crate::options::Detector;
use crate::report::Fault;

/// Lanes in which each register of the frames is written.
#[derive(Debug, Default)]
pub(crate) struct Written {
    pub w: Vec<u32>,
    pub d: Vec<u32>,
    pub p: Vec<u32>,
}

/// The lanes in which a register of the running frame is written.
fn lanes_of(w: &mut Warp, row: Row) -> &mut u32 {
    match row {
        Row::W(slot) => &mut w.written.w[(w.base32 + slot) as usize],
        Row::D(slot) => &mut w.written.d[(w.base64 + slot) as usize],
        Row::P(slot) => &mut w.written.p[(w.basep + slot) as usize],
    }
}

/// Reports the first lane of `mask` in which a register is unwritten.
fn read(m: &Machine<'_>, w: &mut Warp, row: Row, mask: u32) -> Result<(), Trouble> {
    let missing = mask & !*lanes_of(w, row);
    if missing == 0 {
        return Ok(());
    }
    let function = m.env.program.functions.iter().find(|f| (f.start..f.end).contains(&m.site));
    let name = function.and_then(|f| f.unwritten.get(&row)).map_or("", String::as_str);
    let text = format!("register {name} is read before anything wrote it");
    Err(trouble(Fault::UnwrittenRegister, text).at_lane(missing.trailing_zeros() as usize))
}

/// Before an instruction that touches a register in doubt, for the lanes of `mask` among those at this place.
pub(crate) fn check(m: &Machine<'_>, w: &mut Warp, code: &Code, mask: u32) -> Result<(), Trouble> {
    if !m.has(Detector::UnwrittenRegisters) {
        return Ok(());
    }
    if let Some(slot) = code.guard.slot() {
        read(m, w, Row::P(slot), w.cur.mask)?;
    }
    if mask == 0 {
        return Ok(());
    }
    if let Some((to, from)) = unwritten::copies(&code.op) {
        let known = match code.op {
            Op::Compare(Compare::Selp { a, b, p, .. }) => {
                if let PSrc::Reg { slot, .. } = p {
                    read(m, w, Row::P(slot), mask)?;
                }
                let chosen = w.pred(p);
                let [a, b] = [a, b].map(|src| Row::of_src(src).map_or(u32::MAX, |row| *lanes_of(w, row)));
                a & chosen | b & !chosen
            }
            _ => from.into_iter().fold(u32::MAX, |all, row| all & *lanes_of(w, row)),
        };
        for row in to {
            let lanes = lanes_of(w, row);
            *lanes = *lanes & !mask | known & mask;
        }
        return Ok(());
    }
    // With scale-d false a product only writes its accumulators.
    let fresh: &[u32] = match &code.op {
        Op::Wgmma(wgmma) => match &**wgmma {
            Wgmma::Product(p) if w.pred(p.scale_d) & mask == 0 => &p.d,
            _ => &[],
        },
        _ => &[],
    };
    let touches = m.env.program.touches_of(m.site);
    for touch in touches.iter().filter(|t| !t.write) {
        if !matches!(touch.row, Row::W(slot) if fresh.contains(&slot)) {
            read(m, w, touch.row, mask)?;
        }
    }
    for touch in touches.iter().filter(|t| t.write) {
        *lanes_of(w, touch.row) |= mask;
    }
    Ok(())
}
