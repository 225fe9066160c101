//! The instruction set, one file per family.
//!
//! A family file holds both halves of its instructions: `lower`, which reads modifiers and operands from a [`Ctx`] and returns
//! `Ok(None)` for an opcode that is not its own, and `exec`, which runs the lowered form on a warp. To add an instruction: add a
//! variant to the family's enum, an arm to its `lower` and an arm to its `exec`. To add a family: a file, a variant of [`Op`], a row
//! in [`FAMILIES`] and an arm in [`exec`]. Whatever `lower` leaves untaken refuses the instruction, so a modifier nobody wrote code
//! for can not slip through.

pub(crate) mod atomic;
pub(crate) mod barrier;
pub(crate) mod bulk;
pub(crate) mod cluster;
pub(crate) mod collective;
pub(crate) mod compare;
pub(crate) mod control;
pub(crate) mod convert;
pub(crate) mod cp_async;
pub(crate) mod fence;
pub(crate) mod float;
pub(crate) mod half;
pub(crate) mod hints;
pub(crate) mod int;
pub(crate) mod matrix;
pub(crate) mod mbarrier;
pub(crate) mod memory;
pub(crate) mod mma;
pub(crate) mod moves;
pub(crate) mod packed;
pub(crate) mod store_async;
pub(crate) mod tensormap;
pub(crate) mod ty;
pub(crate) mod wgmma;

use crate::front::{Ctx, FrontError};
use crate::machine::{Machine, Trouble, warp::State, warp::Warp};
use ty::Src;

/// An instruction after lowering.
#[derive(Debug)]
pub(crate) struct Code {
    pub guard: Guard,
    pub op: Op,
    /// Touches a register wgmma works on.
    pub watched: bool,
    /// Touches a register that may be read before it is written.
    pub unsure: bool,
}

/// `@p` or `@!p`, or neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Guard(u32);

impl Guard {
    pub const ALWAYS: Guard = Guard(u32::MAX);

    pub fn on(slot: u32, negated: bool) -> Guard {
        Guard(slot << 1 | u32::from(negated))
    }

    #[inline(always)]
    pub fn mask(self, w: &Warp) -> u32 {
        if self.0 == u32::MAX {
            return u32::MAX;
        }
        let row = w.preds[(w.basep + (self.0 >> 1)) as usize];
        if self.0 & 1 != 0 { !row } else { row }
    }

    /// The predicate register.
    pub fn slot(self) -> Option<u32> {
        (!self.always()).then_some(self.0 >> 1)
    }

    pub fn always(self) -> bool {
        self.0 == u32::MAX
    }
}

/// `[base+offset]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mem {
    pub base: Src,
    pub offset: i64,
}

/// One instruction, by family.
#[derive(Debug)]
pub(crate) enum Op {
    Int(int::Int),
    Packed(packed::Packed),
    Float(float::Float),
    Half(half::Half),
    Compare(compare::Compare),
    Convert(convert::Convert),
    Move(moves::Move),
    Memory(memory::Memory),
    Atomic(Box<atomic::Atomic>),
    Collective(collective::Collective),
    Control(control::Control),
    Barrier(barrier::Barrier),
    Fence(fence::Fence),
    Cluster(cluster::Cluster),
    Mbarrier(mbarrier::Mbarrier),
    CpAsync(cp_async::CpAsync),
    Bulk(Box<bulk::Bulk>),
    StoreAsync(Box<store_async::StoreAsync>),
    Tensormap(Box<tensormap::Tensormap>),
    Matrix(Box<matrix::Matrix>),
    Mma(Box<mma::Mma>),
    Wgmma(Box<wgmma::Wgmma>),
    Hint(hints::Hint),
}

/// What happens after an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// Go on at the next instruction.
    Next,
    /// The instruction set the PC and the groups itself.
    Jumped,
    /// Go on at the next instruction, but let others run first when the schedule is random.
    Yield,
    /// Go on at the next instruction after the others had a turn.
    Pause,
    /// Wait in this state and run the instruction again when woken.
    Wait(State),
}

pub(crate) type Exec = Result<Flow, Trouble>;

type Lower = for<'p, 'a> fn(&mut Ctx<'p, 'a>) -> Result<Option<Op>, FrontError>;

/// Tried in order.
const FAMILIES: &[Lower] = &[
    moves::lower,
    int::lower,
    packed::lower,
    float::lower,
    half::lower,
    compare::lower,
    convert::lower,
    memory::lower,
    atomic::lower,
    collective::lower,
    control::lower,
    barrier::lower,
    fence::lower,
    cluster::lower,
    mbarrier::lower,
    bulk::lower,
    store_async::lower,
    tensormap::lower,
    cp_async::lower,
    matrix::lower,
    mma::lower,
    wgmma::lower,
    hints::lower,
];

/// Lowers the instruction in `ctx`, or refuses it with its full text.
pub(crate) fn lower(ctx: &mut Ctx<'_, '_>) -> Result<Op, FrontError> {
    for family in FAMILIES {
        if let Some(op) = family(ctx)? {
            return Ok(op);
        }
    }
    ctx.unimplemented()
}

/// Runs one instruction on the lanes of `mask`.
#[inline(always)]
pub(crate) fn exec(m: &mut Machine<'_>, w: &mut Warp, op: &Op, mask: u32) -> Exec {
    match op {
        Op::Int(i) => int::exec(w, i, mask),
        Op::Move(i) => moves::exec(w, i, mask),
        Op::Float(i) => float::exec(w, i, mask),
        Op::Compare(i) => compare::exec(w, i, mask),
        Op::Convert(i) => convert::exec(w, i, mask),
        Op::Packed(i) => packed::exec(w, i, mask),
        Op::Half(i) => half::exec(w, i, mask),
        Op::Memory(i) => memory::exec(m, w, i, mask),
        Op::Control(i) => control::exec(m, w, i, mask),
        Op::Collective(i) => collective::exec(m, w, i, mask),
        Op::Atomic(i) => atomic::exec(m, w, i, mask),
        Op::Barrier(i) => barrier::exec(m, w, i, mask),
        Op::Fence(i) => fence::exec(m, w, i, mask),
        Op::Cluster(i) => cluster::exec(m, w, i, mask),
        Op::Mbarrier(i) => mbarrier::exec(m, w, i, mask),
        Op::CpAsync(i) => cp_async::exec(m, w, i, mask),
        Op::Bulk(i) => bulk::exec(m, w, i, mask),
        Op::StoreAsync(i) => store_async::exec(m, w, i, mask),
        Op::Tensormap(i) => tensormap::exec(m, w, i, mask),
        Op::Matrix(i) => matrix::exec(m, w, i, mask),
        Op::Mma(i) => mma::exec(w, i, mask),
        Op::Wgmma(i) => wgmma::exec(m, w, i, mask),
        Op::Hint(i) => hints::exec(m, w, i, mask),
    }
}
