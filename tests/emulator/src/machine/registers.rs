//! Registers read before anything wrote them.
//!
//! Each register of a frame has a mask of the lanes in which it is written. All lanes count as written from
//! the start, but for the few registers that the image's control flow leaves in doubt ([`unwritten`]): so
//! only instructions that touch one of those are looked at. Arithmetic on unwritten registers makes unwritten
//! ones and is no fault, because compilers compute ahead of the branch that decides whether the result is
//! wanted. Reading them for anything else is one: as an address, as a value to store or to pass on, as a
//! condition, as a fragment of a matrix.

use super::warp::Warp;
use super::{Machine, Trouble, trouble};
use crate::front::unwritten;
use crate::isa::compare::{Bool, Compare};
use crate::isa::ty::PSrc;
use crate::isa::wgmma::Wgmma;
use crate::isa::{Code, Op};
use crate::module::{Row, Touch};
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
    let text = format!("register {name} is read, but nothing wrote it or what it is made of");
    Err(trouble(Fault::UnwrittenRegister, text).at_lane(missing.trailing_zeros() as usize))
}

/// The lanes in which the result of arithmetic is made of written registers.
fn made(w: &mut Warp, op: &Op, touches: &[Touch]) -> u32 {
    let mut of = |row: Option<Row>| row.map_or(u32::MAX, |row| *lanes_of(w, row));
    let predicate = |p: PSrc| if let PSrc::Reg { slot, .. } = p { Some(Row::P(slot)) } else { None };
    // One side can decide the result: a false one that of `and`, a true one that of `or`. A selection reads one
    // side. The other side may then be unwritten.
    match *op {
        Op::Compare(Compare::Selp { a, b, p, .. }) => {
            let (a, b, chooser) = (of(Row::of_src(a)), of(Row::of_src(b)), of(predicate(p)));
            let chosen = w.pred(p);
            chooser & (a & chosen | b & !chosen)
        }
        Op::Compare(Compare::Pred { op: Some(how), a, b, .. }) => {
            let (known_a, known_b) = (of(predicate(a)), of(predicate(b)));
            let (a, b) = (w.pred(a), w.pred(b));
            known_a & known_b | known_a & decides(how, a) | known_b & decides(how, b)
        }
        Op::Compare(Compare::Setp { combine: Some((how, c)), a, b, .. }) => {
            let known = of(predicate(c));
            known & (of(Row::of_src(a)) & of(Row::of_src(b)) | decides(how, w.pred(c)))
        }
        _ => touches.iter().filter(|t| !t.write).fold(u32::MAX, |all, t| all & of(Some(t.row))),
    }
}

/// Lanes in which one side of a combination settles the result.
fn decides(how: Bool, side: u32) -> u32 {
    match how {
        Bool::And => !side,
        Bool::Or => side,
        Bool::Xor => 0,
    }
}

/// Before an instruction that touches a register in doubt, for the lanes of `mask` among those at this place.
pub(crate) fn check(m: &Machine<'_>, w: &mut Warp, code: &Code, mask: u32) -> Result<(), Trouble> {
    if !m.has(Detector::UnwrittenRegisters) {
        return Ok(());
    }
    let guard = code.guard.slot().map(Row::P);
    let touches = m.env.program.touches_of(m.site);
    if unwritten::is_pure(&code.op) {
        let known = made(w, &code.op, touches);
        // Whether lanes with an unwritten predicate take part is unknown, so their result is.
        let unsure = w.cur.mask & !guard.map_or(u32::MAX, |row| *lanes_of(w, row));
        for touch in touches.iter().filter(|t| t.write) {
            let lanes = lanes_of(w, touch.row);
            *lanes = (*lanes & !mask | known & mask) & !unsure;
        }
        return Ok(());
    }
    if let Some(row) = guard {
        read(m, w, row, w.cur.mask)?;
    }
    if mask == 0 {
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
