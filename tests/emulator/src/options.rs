//! How a device behaves: schedule, completion of asynchronous copies, detectors, limits.

use std::fmt;

/// The order in which ready warps run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Schedule {
    /// Blocks, warps and lanes in ascending order; a warp runs until it blocks.
    #[default]
    InOrder,
    /// Blocks, warps and lanes in descending order.
    Reverse,
    /// Seeded random choice, with extra yields at atomics, arrivals and barriers.
    Random(u64),
}

/// When a bulk copy into shared memory completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum TmaCompletion {
    /// At issue.
    #[default]
    Eager,
    /// Only when nothing else in the cluster can run.
    Lazy,
    /// At random points, from the seed of the schedule (or seed 0).
    Random,
}

/// One detector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Detector {
    /// Data races in shared and global memory, between blocks too; but for [`Detector::EqualWrites`].
    Race = 1 << 0,
    /// Reads of bytes nobody wrote.
    Uninitialised = 1 << 1,
    /// Ordinary writes read through the async proxy without a proxy fence in between.
    ProxyFence = 1 << 2,
    /// A wgmma descriptor whose swizzle differs from the one TMA wrote the bytes with, and tiles of TMA that
    /// do not begin where their swizzle does.
    Swizzle = 1 << 3,
    /// Accumulators and A registers touched while a wgmma may use them, and missing `wgmma.fence`.
    WgmmaRegisters = 1 << 4,
    /// Work left unfinished when a thread or a block exits.
    ExitState = 1 << 5,
    /// Two different source lines meeting at one aligned barrier of the whole block, such as `__syncthreads`.
    BarrierSite = 1 << 6,
    /// Registers read before anything wrote them, other than by arithmetic whose result is not read either.
    UnwrittenRegisters = 1 << 7,
    /// Threads that write the same bytes to the same place of shared memory by one instruction, unordered. To
    /// the memory model that is a race like any other; hardware does not show it.
    EqualWrites = 1 << 8,
}

/// A set of detectors. Bounds, alignment, mbarrier protocol, `.aligned` and deadlock checks cannot be switched off.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Detectors(u16);

impl Detectors {
    /// Every detector, in the order of their bits.
    pub const EACH: [Detector; 9] = [
        Detector::Race,
        Detector::Uninitialised,
        Detector::ProxyFence,
        Detector::Swizzle,
        Detector::WgmmaRegisters,
        Detector::ExitState,
        Detector::BarrierSite,
        Detector::UnwrittenRegisters,
        Detector::EqualWrites,
    ];

    /// Every detector on: the default.
    pub const fn all() -> Self {
        Self(0x1ff)
    }

    /// Only the checks that cannot be switched off.
    pub const fn none() -> Self {
        Self(0)
    }

    /// This set and `detector`.
    #[must_use]
    pub const fn with(self, detector: Detector) -> Self {
        Self(self.0 | detector as u16)
    }

    /// This set without `detector`.
    #[must_use]
    pub const fn without(self, detector: Detector) -> Self {
        Self(self.0 & !(detector as u16))
    }

    /// Whether `detector` is in the set.
    pub const fn has(self, detector: Detector) -> bool {
        self.0 & detector as u16 != 0
    }
}

impl Default for Detectors {
    fn default() -> Self {
        Self::all()
    }
}

impl fmt::Debug for Detectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(Self::EACH.iter().filter(|d| self.has(**d))).finish()
    }
}

/// What a device is and how it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The order in which warps and blocks run.
    pub schedule: Schedule,
    /// When bulk copies into shared memory complete.
    pub tma: TmaCompletion,
    /// Which detectors watch.
    pub detectors: Detectors,
    /// Warp instructions one launch may execute before it is stopped with a report.
    pub step_limit: u64,
    /// Host threads that run independent clusters. With more than one the order between clusters is the host's, so a failing seed
    /// replays exactly only with `workers: 1`.
    pub workers: usize,
    /// Multiprocessors the device claims to have.
    pub sm_count: u32,
    /// Bytes of device memory that may be allocated at once.
    pub memory_limit: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            schedule: Schedule::InOrder,
            tma: TmaCompletion::Eager,
            detectors: Detectors::all(),
            step_limit: 2_000_000_000,
            workers: 1,
            sm_count: 4,
            memory_limit: 80 << 30,
        }
    }
}

impl Options {
    /// The combinations every kernel test runs: eager and lazy completion with both fixed orders, then `seeds` random schedules with
    /// random completion.
    pub fn standard(seeds: u64) -> Vec<Options> {
        let fixed = [
            (Schedule::InOrder, TmaCompletion::Eager),
            (Schedule::InOrder, TmaCompletion::Lazy),
            (Schedule::Reverse, TmaCompletion::Eager),
            (Schedule::Reverse, TmaCompletion::Lazy),
        ];
        let random = (0..seeds).map(|seed| (Schedule::Random(seed), TmaCompletion::Random));
        fixed.into_iter().chain(random).map(|(schedule, tma)| Options { schedule, tma, ..Options::default() }).collect()
    }
}
