//! A warp: registers, lanes, groups of lanes at one PC, call frames.

use crate::isa::ty::{PSrc, Reg, Special, Src};
use crate::module::{FunctionInfo, Row};

/// One value per lane.
pub(crate) type L32 = [u32; 32];
/// One 64-bit value per lane.
pub(crate) type L64 = [u64; 32];

/// What a register holds before its first write: NaN in every float format, and rarely a valid address.
const POISON: u32 = 0xffff_ffff;

/// Lanes of a warp that are at one PC in one frame.
#[derive(Clone, Debug, Default)]
pub(crate) struct Group {
    pub pc: u32,
    pub mask: u32,
    pub frame: u32,
    pub state: State,
    /// Set when the wait of the instruction at `pc` is over: its value, which the instruction takes when it runs again.
    pub result: Option<u32>,
}

/// Whether a group can run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum State {
    #[default]
    Ready,
    /// At an `.aligned` instruction, waiting for the rest of the warp.
    Aligned,
    /// At a warp collective, waiting for the lanes of the mask.
    Collective(u32),
    /// At a block barrier.
    Barrier(u8),
    /// At `barrier.cluster.wait`.
    ClusterBarrier,
    /// At an mbarrier wait: CTA rank, offset, parity.
    Mbarrier { rank: u32, offset: u32, parity: u8 },
    /// At `wgmma.wait_group`, until the whole warpgroup has queued.
    Wgmma,
}

/// A function activation, shared by the lanes that called together.
#[derive(Clone, Debug)]
pub(crate) struct Frame {
    pub parent: u32,
    pub depth: u32,
    /// Where the caller goes on.
    pub return_pc: u32,
    /// Index of the call in the caller's code, for its result operands.
    pub call_pc: u32,
    /// First rows of the frame.
    pub base32: u32,
    pub base64: u32,
    pub basep: u32,
    /// First byte of the frame's locals in each lane's local memory.
    pub local_base: u32,
    /// Parameter bytes of this activation, lane-major.
    pub params: Vec<u8>,
    /// Lanes that are inside this activation or a callee.
    pub live: u32,
}

/// 32 lanes.
#[derive(Debug, Default)]
pub(crate) struct Warp {
    /// CTA rank in the cluster.
    pub cta: u32,
    /// Warp in its CTA.
    pub index: u32,
    /// Warp in the cluster.
    pub slot: u32,
    /// First thread of this warp among the cluster's threads.
    pub thread0: u32,
    /// Lanes that exist.
    pub exists: u32,
    /// Lanes that have not exited.
    pub live: u32,
    pub cur: Group,
    pub others: Vec<Group>,
    /// Leave the fast path when the PC gets here.
    pub merge_pc: u32,
    pub frames: Vec<Frame>,
    /// Offsets of the running frame.
    pub base32: u32,
    pub base64: u32,
    pub basep: u32,
    pub r32: Vec<L32>,
    pub r64: Vec<L64>,
    pub preds: Vec<u32>,
    pub written: super::registers::Written,
    /// Carry flag of the extended-precision instructions.
    pub carry: u32,
    pub tid: [L32; 3],
    pub ids: Ids,
    /// The running group got its turn although another comes first.
    pub rotated: bool,
    /// Some group can run.
    pub ready: bool,
    /// Lanes that have arrived at the cluster barrier and not yet waited, and the generation they arrived in.
    pub cluster_arrived: u32,
    pub cluster_generation: u64,
    /// `try_wait`s that have returned false once: PC and lanes.
    pub tried: Vec<(u32, u32)>,
    /// `setmaxnreg` instructions executed.
    pub setmaxnreg: u32,
    pub collectives: Vec<crate::isa::collective::Rendezvous>,
    pub wgmma: crate::machine::wgmma::WarpWgmma,
    pub bulk: crate::machine::tma::WarpBulk,
    pub cp_async: crate::isa::cp_async::WarpCpAsync,
    pub local: crate::memory::local::Local,
}

/// Values equal in all lanes of a warp.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ids {
    pub ntid: [u32; 3],
    pub ctaid: [u32; 3],
    pub nctaid: [u32; 3],
    pub clusterid: [u32; 3],
    pub nclusterid: [u32; 3],
    pub cluster_ctaid: [u32; 3],
    pub cluster_nctaid: [u32; 3],
    pub explicit_cluster: bool,
    pub nwarps: u32,
    pub smid: u32,
    pub nsmid: u32,
    pub shared_base: u32,
    pub dynamic_base: u32,
    pub dynamic_bytes: u32,
    pub clock: u32,
}

/// The lanes of a mask, ascending.
#[inline]
pub(crate) fn lanes(mask: u32) -> Lanes {
    Lanes(mask)
}

#[derive(Clone, Copy)]
pub(crate) struct Lanes(u32);

impl Iterator for Lanes {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        if self.0 == 0 {
            return None;
        }
        let lane = self.0.trailing_zeros() as usize;
        self.0 &= self.0 - 1;
        Some(lane)
    }
}

impl Warp {
    /// Values of a source, truncated to 32 bits.
    #[inline(always)]
    pub fn get32(&self, src: Src) -> L32 {
        match src {
            Src::W(slot) => self.r32[(self.base32 + slot) as usize],
            Src::Imm(v) => [v as u32; 32],
            Src::D(slot) => self.r64[(self.base64 + slot) as usize].map(|v| v as u32),
            Src::Special(s) => self.special(s).map(|v| v as u32),
        }
    }

    /// Values of a source, zero-extended to 64 bits.
    #[inline(always)]
    pub fn get64(&self, src: Src) -> L64 {
        match src {
            Src::D(slot) => self.r64[(self.base64 + slot) as usize],
            Src::W(slot) => self.r32[(self.base32 + slot) as usize].map(u64::from),
            Src::Imm(v) => [v; 32],
            Src::Special(s) => self.special(s),
        }
    }

    #[inline(always)]
    pub fn pred(&self, p: PSrc) -> u32 {
        match p {
            PSrc::Reg { slot, negated } => self.preds[(self.basep + slot) as usize] ^ if negated { u32::MAX } else { 0 },
            PSrc::Const(v) => {
                if v {
                    u32::MAX
                } else {
                    0
                }
            }
        }
    }

    #[inline(always)]
    pub fn set_pred(&mut self, slot: Option<u32>, mask: u32, value: u32) {
        if let Some(slot) = slot {
            let row = &mut self.preds[(self.basep + slot) as usize];
            *row = *row & !mask | value & mask;
        }
    }

    #[inline(always)]
    pub fn put32(&mut self, reg: Reg, mask: u32, v: &L32) {
        match reg {
            Reg::W(slot, bits) => {
                let row = &mut self.r32[(self.base32 + slot) as usize];
                let keep = if bits == 32 { u32::MAX } else { (1 << bits) - 1 };
                if mask == u32::MAX {
                    for l in 0..32 {
                        row[l] = v[l] & keep;
                    }
                } else {
                    for l in 0..32 {
                        if mask >> l & 1 != 0 {
                            row[l] = v[l] & keep;
                        }
                    }
                }
            }
            Reg::D(_) => self.put64(reg, mask, &v.map(u64::from)),
            Reg::Sink => {}
        }
    }

    #[inline(always)]
    pub fn put64(&mut self, reg: Reg, mask: u32, v: &L64) {
        match reg {
            Reg::D(slot) => {
                let row = &mut self.r64[(self.base64 + slot) as usize];
                if mask == u32::MAX {
                    *row = *v;
                } else {
                    for l in lanes(mask) {
                        row[l] = v[l];
                    }
                }
            }
            Reg::W(..) => self.put32(reg, mask, &v.map(|v| v as u32)),
            Reg::Sink => {}
        }
    }

    pub fn special(&self, s: Special) -> L64 {
        use Special::*;
        let ids = &self.ids;
        let same = |v: u32| [u64::from(v); 32];
        let by_lane = |f: fn(u32) -> u32| std::array::from_fn(|l| u64::from(f(l as u32)));
        match s {
            Tid(a) => self.tid[usize::from(a)].map(u64::from),
            Ntid(a) => same(ids.ntid[usize::from(a)]),
            Ctaid(a) => same(ids.ctaid[usize::from(a)]),
            Nctaid(a) => same(ids.nctaid[usize::from(a)]),
            ClusterId(a) => same(ids.clusterid[usize::from(a)]),
            NclusterId(a) => same(ids.nclusterid[usize::from(a)]),
            ClusterCtaid(a) => same(ids.cluster_ctaid[usize::from(a)]),
            ClusterNctaid(a) => same(ids.cluster_nctaid[usize::from(a)]),
            ClusterCtarank => same(self.cta),
            ClusterNctarank => same(ids.cluster_nctaid.iter().product()),
            IsExplicitCluster => same(ids.explicit_cluster.into()),
            Laneid => by_lane(|l| l),
            Warpid => same(self.index),
            Nwarpid => same(ids.nwarps),
            Smid => same(ids.smid),
            Nsmid => same(ids.nsmid),
            Gridid => same(1),
            LanemaskEq => by_lane(|l| 1 << l),
            LanemaskLt => by_lane(|l| (1 << l) - 1),
            LanemaskLe => by_lane(|l| u32::MAX >> (31 - l)),
            LanemaskGt => by_lane(|l| !(u32::MAX >> (31 - l))),
            LanemaskGe => by_lane(|l| !((1 << l) - 1)),
            Clock => same(ids.clock),
            DynamicSmemSize => same(ids.dynamic_bytes),
            TotalSmemSize => same(ids.dynamic_base - (ids.shared_base & 0xff_ffff) + ids.dynamic_bytes),
            SharedVar(offset) => same(ids.shared_base + offset),
            DynamicShared(offset) => same((ids.shared_base & !0xff_ffff | ids.dynamic_base).wrapping_add_signed(offset)),
            LocalVar(offset) => same(self.frames[self.cur.frame as usize].local_base + offset),
        }
    }

    /// Makes room for the rows of a function's frame, and gives their beginnings.
    pub fn extend_rows(&mut self, f: &FunctionInfo) -> (u32, u32, u32) {
        let (w, d, p) = (self.r32.len(), self.r64.len(), self.preds.len());
        self.r32.resize(w + f.rows32 as usize, [POISON; 32]);
        self.r64.resize(d + f.rows64 as usize, [u64::MAX; 32]);
        self.preds.resize(p + f.rowsp as usize, 0);
        self.written.w.resize(self.r32.len(), u32::MAX);
        self.written.d.resize(self.r64.len(), u32::MAX);
        self.written.p.resize(self.preds.len(), u32::MAX);
        for row in f.unwritten.keys() {
            match *row {
                Row::W(slot) => self.written.w[w + slot as usize] = 0,
                Row::D(slot) => self.written.d[d + slot as usize] = 0,
                Row::P(slot) => self.written.p[p + slot as usize] = 0,
            }
        }
        (w as u32, d as u32, p as u32)
    }

    /// Gives up the rows from these beginnings on.
    pub fn truncate_rows(&mut self, w: u32, d: u32, p: u32) {
        self.r32.truncate(w as usize);
        self.r64.truncate(d as usize);
        self.preds.truncate(p as usize);
        self.written.w.truncate(w as usize);
        self.written.d.truncate(d as usize);
        self.written.p.truncate(p as usize);
    }

    /// Points the register bases at the running group's frame.
    pub fn enter_frame(&mut self) {
        let frame = &self.frames[self.cur.frame as usize];
        (self.base32, self.base64, self.basep) = (frame.base32, frame.base64, frame.basep);
    }
}
