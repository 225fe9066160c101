//! One resident cluster: its CTAs, warps, clocks and asynchronous work. Everything an instruction can reach.

pub(crate) mod access;
pub(crate) mod async_access;
pub(crate) mod block;
pub(crate) mod deadlock;
pub(crate) mod launch;
pub(crate) mod mbarrier;
pub(crate) mod product;
pub(crate) mod registers;
pub(crate) mod rng;
pub(crate) mod run;
pub(crate) mod sched;
pub(crate) mod sync;
pub(crate) mod tma;
pub(crate) mod warp;
pub(crate) mod wgmma;

use crate::isa::ty::RANK_SHIFT;
use crate::memory::global::GlobalMemory;
use crate::memory::shared::Shared;
use crate::module::Program;
use crate::options::{Detector, Options};
use crate::race::{Clocks, clock::Clock};
use crate::report::Fault;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};

/// A fault before it has a place.
#[derive(Clone, Debug)]
pub(crate) struct Problem {
    pub fault: Fault,
    pub message: String,
    pub lane: Option<usize>,
    /// Where, if not at the running instruction.
    pub pc: Option<u32>,
    /// Block, thread, where the fault is not the running thread's.
    pub thread: Option<(u32, Option<u32>)>,
    /// The earlier access.
    pub other: Option<u32>,
}

/// Boxed, so that the result of an instruction stays small.
pub(crate) type Trouble = Box<Problem>;

pub(crate) fn trouble(fault: Fault, message: impl Into<String>) -> Trouble {
    Box::new(Problem { fault, message: message.into(), lane: None, pc: None, thread: None, other: None })
}

impl Problem {
    pub fn at_lane(mut self: Box<Self>, lane: usize) -> Box<Self> {
        self.lane = Some(lane);
        self
    }

    pub fn other(mut self: Box<Self>, pc: u32) -> Box<Self> {
        self.other = Some(pc);
        self
    }
}

/// What synchronises clusters with each other: clocks released by strong writes to global memory, by address.
pub(crate) type GlobalSync = Mutex<HashMap<u64, Vec<(u32, Arc<Clock>)>>>;

/// What all clusters of a launch share.
#[derive(Debug)]
pub(crate) struct Env<'g> {
    pub program: &'g Program,
    pub function: usize,
    pub params: &'g [u8],
    pub global: &'g GlobalMemory,
    pub options: &'g Options,
    /// Number of this launch on its device.
    pub launch: u64,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub cluster: [u32; 3],
    pub explicit_cluster: bool,
    pub dynamic_shared: u32,
    pub sync: GlobalSync,
    /// Whether `sync` was ever written.
    pub sync_used: AtomicBool,
    /// Warp instructions executed by all workers, counted in batches.
    pub steps: AtomicU64,
    /// A worker met a fault; the others stop.
    pub stop: AtomicBool,
}

/// Bytes moved to and from one buffer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    pub loaded: u64,
    pub stored: u64,
    pub bulk_loaded: u64,
    pub bulk_stored: u64,
}

/// What a worker counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counters {
    pub thread_instructions: u64,
    pub warp_instructions: u64,
    pub wgmmas: u64,
    /// By buffer index.
    pub traffic: Vec<Traffic>,
}

impl Counters {
    pub fn new(buffers: usize) -> Self {
        Self { traffic: vec![Traffic::default(); buffers], ..Self::default() }
    }

    pub fn add(&mut self, other: &Counters) {
        self.thread_instructions += other.thread_instructions;
        self.warp_instructions += other.warp_instructions;
        self.wgmmas += other.wgmmas;
        for (to, from) in self.traffic.iter_mut().zip(&other.traffic) {
            to.loaded += from.loaded;
            to.stored += from.stored;
            to.bulk_loaded += from.bulk_loaded;
            to.bulk_stored += from.bulk_stored;
        }
    }
}

/// One block.
#[derive(Debug)]
pub(crate) struct Cta {
    pub shared: Shared,
    pub barriers: [block::BlockBarrier; 16],
    /// Threads that have not exited.
    pub live: u32,
    pub threads: u32,
    /// First warp slot, and how many.
    pub warp0: u32,
    pub warps: u32,
    pub groups: Vec<wgmma::Warpgroup>,
    /// Round robin over the TMA load actors.
    pub next_tma: usize,
}

/// A blocked group's wait is over.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wake {
    Mbarrier { slot: u32 },
    Barrier { slot: u32, id: u8, result: u32 },
    Cluster { slot: u32 },
    Wgmma { slot: u32 },
}

/// Asynchronous actors per CTA: TMA loads, bulk reads of shared memory, bulk writes of global memory, then one per warpgroup, then
/// one per thread where the kernel uses `cp.async`.
pub(crate) const TMA_ACTORS: usize = 8;

/// One cluster on its way from start to exit.
#[derive(Debug)]
pub(crate) struct Machine<'g> {
    pub env: &'g Env<'g>,
    /// Cluster in the launch.
    pub index: u32,
    pub ctas: Vec<Cta>,
    pub warps: Vec<warp::Warp>,
    pub clocks: Clocks,
    pub actors_per_cta: usize,
    pub pending: Vec<tma::Pending>,
    pub wakes: Vec<Wake>,
    pub cluster_barrier: block::ClusterBarrier,
    pub rng: rng::Rng,
    pub counters: Counters,
    /// PC of the running instruction: the site of its accesses.
    pub site: u32,
    pub random: bool,
    pub reverse: bool,
    pub check_init: bool,
}

/// A place in the shared memory of CTA `rank` of `ctas`, for messages.
pub(crate) fn shared_name(ctas: usize, rank: usize, offset: usize) -> String {
    if ctas > 1 { format!("smem+{offset:#x} of CTA {rank}") } else { format!("smem+{offset:#x}") }
}

impl<'g> Machine<'g> {
    pub fn has(&self, detector: Detector) -> bool {
        self.env.options.detectors.has(detector)
    }

    /// Threads per CTA.
    pub fn threads_per_cta(&self) -> usize {
        self.env.block.iter().product::<u32>() as usize
    }

    /// Index of an asynchronous actor of a CTA, for [`Clocks::start`].
    pub fn actor(&self, cta: u32, n: usize) -> usize {
        cta as usize * self.actors_per_cta + n
    }

    /// Splits a shared address: CTA and low bits.
    #[inline]
    pub fn split_shared(&self, address: u64) -> Option<(usize, u32)> {
        let rank = (address >> RANK_SHIFT) as usize;
        (rank < self.ctas.len()).then_some((rank, address as u32 & ((1 << RANK_SHIFT) - 1)))
    }

    /// `smem+0x40`, with the CTA where there are several.
    pub fn shared_name(&self, rank: usize, offset: usize) -> String {
        shared_name(self.ctas.len(), rank, offset)
    }

    /// An actor of this cluster, for messages.
    pub fn actor_name(&self, actor: u16) -> String {
        let actor = usize::from(actor);
        let per = self.threads_per_cta();
        let of = |cta: usize| if self.ctas.len() > 1 { format!(" of CTA {cta}") } else { String::new() };
        let threads = per * self.ctas.len();
        if actor < threads {
            return format!("thread {}{}", actor % per, of(actor / per));
        }
        let (cta, n) = ((actor - threads) / self.actors_per_cta, (actor - threads) % self.actors_per_cta);
        let groups = per.div_ceil(128);
        match n {
            n if n < TMA_ACTORS => format!("TMA load{}", of(cta)),
            n if n == TMA_ACTORS => format!("TMA store{}", of(cta)),
            n if n == TMA_ACTORS + 1 => format!("TMA store{}", of(cta)),
            n if n < TMA_ACTORS + 2 + groups => format!("wgmma of warpgroup {}{}", n - TMA_ACTORS - 2, of(cta)),
            n => format!("cp.async of thread {}{}", n - TMA_ACTORS - 2 - groups, of(cta)),
        }
    }

    /// Whether the schedule wants a pause here.
    pub fn dice(&mut self) -> bool {
        self.random && self.rng.below(4) == 0
    }
}
