//! Launching: the limits, the making of clusters, the workers, the report.

use super::block::BlockBarrier;
use super::sched::{self, Failure};
use super::warp::{Frame, Group, Ids, State, Warp};
use super::wgmma::Warpgroup;
use super::{Counters, Cta, Env, Machine, TMA_ACTORS};
use crate::error::LaunchError;
use crate::gpu::Launch;
use crate::isa::ty::{RANK_SHIFT, SHARED_BASE};
use crate::memory::shared::Shared;
use crate::module::Kernel;
use crate::options::{Detector, Schedule};
use crate::race::{Clocks, Watch};
use crate::report::{Fault, Report};
use std::sync::atomic::AtomicU32;

/// Shared memory of a multiprocessor, and of one block with what the system takes.
const SHARED_PER_SM: u32 = 228 << 10;

/// Checks a launch against the kernel and the device. Returns the cluster shape.
pub(crate) fn validate(kernel: &Kernel, launch: &Launch<'_>) -> Result<[u32; 3], LaunchError> {
    let info = kernel.info();
    let limit = |what: &'static str, got: u64, limit: u64| if got > limit { Err(LaunchError::Limit { what, got, limit }) } else { Ok(()) };
    let shape = |rule: &'static str, got: [u32; 3], against: [u32; 3]| Err(LaunchError::Shape { rule, got, against });
    if launch.grid.contains(&0) {
        return shape("grid must be at least 1 in every dimension", launch.grid, [1; 3]);
    }
    if launch.block.contains(&0) {
        return shape("block must be at least 1 in every dimension", launch.block, [1; 3]);
    }
    limit("grid.x", launch.grid[0].into(), (1 << 31) - 1)?;
    limit("grid.y", launch.grid[1].into(), 65_535)?;
    limit("grid.z", launch.grid[2].into(), 65_535)?;
    limit("block.x", launch.block[0].into(), 1024)?;
    limit("block.y", launch.block[1].into(), 1024)?;
    limit("block.z", launch.block[2].into(), 64)?;
    let threads: u64 = launch.block.iter().map(|&d| u64::from(d)).product();
    limit("threads per block", threads, kernel.max_threads().into())?;
    if let Some(exact) = info.exact_threads
        && exact != launch.block
    {
        return shape("block must be what the kernel requires (.reqntid)", launch.block, exact);
    }
    if let Some(max) = info.max_threads {
        let product: u64 = max.iter().map(|&d| u64::from(d)).product();
        limit("threads per block", threads, product)?;
    }
    let cluster = match (launch.cluster, info.cluster) {
        (Some(given), Some(want)) if given != want => {
            return shape("cluster must be what the kernel requires (.reqnctapercluster)", given, want);
        }
        (given, want) => given.or(want).unwrap_or([1; 3]),
    };
    if cluster.contains(&0) {
        return shape("cluster must be at least 1 in every dimension", cluster, [1; 3]);
    }
    limit("blocks per cluster", cluster.iter().map(|&d| u64::from(d)).product(), 16)?;
    if (0..3).any(|i| !launch.grid[i].is_multiple_of(cluster[i])) {
        return shape("grid must be a multiple of the cluster", launch.grid, cluster);
    }
    let clusters: u64 = (0..3).map(|i| u64::from(launch.grid[i] / cluster[i])).product();
    limit("clusters in the grid", clusters, (1 << 31) - 1)?;
    limit("dynamic shared memory", launch.shared_bytes.into(), kernel.max_dynamic_shared().into())?;
    limit("shared memory", u64::from(launch.shared_bytes) + u64::from(kernel.program.dynamic_offset(kernel.function)), 232_448)?;
    if launch.params.len() != info.param_bytes as usize {
        return Err(LaunchError::Params { want: info.param_bytes as usize, got: launch.params.len() });
    }
    Ok(cluster)
}

/// Clusters that fit on the device at once.
pub(crate) fn resident_clusters(env: &Env<'_>) -> usize {
    let threads: u32 = env.block.iter().product();
    let shared = env.program.dynamic_offset(env.function) + env.dynamic_shared + 1024;
    let per_sm = (2048 / threads.next_multiple_of(32)).min(SHARED_PER_SM / shared).clamp(1, 32);
    let size: u32 = env.cluster.iter().product();
    (env.options.sm_count.max(1) * per_sm / size).max(1) as usize
}

/// Clusters per dimension.
fn cluster_grid(env: &Env<'_>) -> [u32; 3] {
    std::array::from_fn(|i| env.grid[i] / env.cluster[i])
}

fn coords(linear: u32, dims: [u32; 3]) -> [u32; 3] {
    [linear % dims[0], linear / dims[0] % dims[1], linear / dims[0] / dims[1]]
}

/// Block index of CTA `rank` of cluster `index`.
pub(crate) fn block_coords(env: &Env<'_>, index: u32, rank: u32) -> [u32; 3] {
    let (c, r) = (coords(index, cluster_grid(env)), coords(rank, env.cluster));
    std::array::from_fn(|i| c[i] * env.cluster[i] + r[i])
}

/// Makes cluster `index`, ready to run.
pub(crate) fn machine<'g>(env: &'g Env<'g>, index: u32, buffers: usize) -> Machine<'g> {
    let info = &env.program.functions[env.function];
    let options = env.options;
    let size: u32 = env.cluster.iter().product();
    let threads: u32 = env.block.iter().product();
    let nwarps = threads.div_ceil(32);
    let groups = nwarps.div_ceil(4);
    let actors_per_cta = TMA_ACTORS + 2 + groups as usize;
    let has = |detector| options.detectors.has(detector);
    let watch = Watch { race: has(Detector::Race), equal: has(Detector::EqualWrites), proxy: has(Detector::ProxyFence) };
    let proxy = env.program.uses().async_proxy;
    let clocks = Clocks::new(watch, index, (threads * size) as usize, actors_per_cta * size as usize, proxy);
    let seed = if let Schedule::Random(seed) = options.schedule { seed } else { 0 };
    let dynamic_offset = env.program.dynamic_offset(env.function);
    let mut ctas = Vec::new();
    let mut warps = Vec::new();
    for rank in 0..size {
        let warp0 = warps.len() as u32;
        for i in 0..nwarps {
            warps.push(warp(env, index, rank, i, warps.len() as u32, dynamic_offset));
        }
        ctas.push(Cta {
            shared: Shared::new((dynamic_offset + env.dynamic_shared) as usize),
            barriers: std::array::from_fn(|_| BlockBarrier::default()),
            live: threads,
            threads,
            warp0,
            warps: nwarps,
            groups: (0..groups).map(|_| Warpgroup::default()).collect(),
            next_tma: 0,
        });
    }
    Machine {
        env,
        index,
        ctas,
        warps,
        clocks,
        actors_per_cta,
        pending: Vec::new(),
        wakes: Vec::new(),
        cluster_barrier: Default::default(),
        rng: super::rng::Rng::new(seed ^ u64::from(index) << 32),
        counters: Counters::new(buffers),
        site: info.start,
        random: matches!(options.schedule, Schedule::Random(_)),
        reverse: options.schedule == Schedule::Reverse,
        check_init: options.detectors.has(Detector::Uninitialised),
    }
}

fn warp(env: &Env<'_>, cluster: u32, rank: u32, index: u32, slot: u32, dynamic_offset: u32) -> Warp {
    let info = &env.program.functions[env.function];
    let threads: u32 = env.block.iter().product();
    let lanes = (threads - index * 32).min(32);
    let exists = if lanes == 32 { u32::MAX } else { (1 << lanes) - 1 };
    let mut w = Warp { cta: rank, index, slot, thread0: rank * threads + index * 32, exists, live: exists, ready: true, ..Warp::default() };
    w.cur = Group { pc: info.start, mask: exists, frame: 0, state: State::Ready, result: None };
    w.merge_pc = u32::MAX;
    w.extend_rows(info);
    let local_base = w.local.push(info.local_bytes).unwrap_or(0);
    let extra = (info.frame_param_bytes as usize).saturating_sub(env.params.len());
    w.frames.push(Frame {
        parent: 0,
        depth: 0,
        return_pc: 0,
        call_pc: 0,
        base32: 0,
        base64: 0,
        basep: 0,
        local_base,
        params: vec![0xff; extra * 32],
        live: exists,
    });
    for l in 0..32 {
        let t = coords(index * 32 + l, env.block);
        for (axis, v) in t.iter().enumerate() {
            w.tid[axis][l as usize] = *v;
        }
    }
    let block = block_coords(env, cluster, rank);
    w.ids = Ids {
        ntid: env.block,
        ctaid: block,
        nctaid: env.grid,
        clusterid: coords(cluster, cluster_grid(env)),
        nclusterid: cluster_grid(env),
        cluster_ctaid: coords(rank, env.cluster),
        cluster_nctaid: env.cluster,
        explicit_cluster: env.explicit_cluster,
        nwarps: threads.div_ceil(32),
        smid: cluster % env.options.sm_count.max(1),
        nsmid: env.options.sm_count,
        shared_base: rank << RANK_SHIFT | SHARED_BASE,
        dynamic_base: SHARED_BASE + dynamic_offset,
        dynamic_bytes: env.dynamic_shared,
        clock: 0,
    };
    w
}

/// Runs all clusters.
pub(crate) fn run(env: &Env<'_>) -> Result<Counters, Box<Failure>> {
    let clusters: u32 = cluster_grid(env).iter().product();
    let next = AtomicU32::new(0);
    let buffers = env.global.count();
    let workers = env.options.workers.clamp(1, 256).min(clusters as usize);
    let mut total = Counters::new(buffers);
    if workers == 1 {
        sched::work(env, &next, clusters, &mut total)?;
        return Ok(total);
    }
    let results: Vec<_> = std::thread::scope(|scope| {
        let work = || {
            let mut counters = Counters::new(buffers);
            let result = sched::work(env, &next, clusters, &mut counters);
            result.map(|()| counters)
        };
        let handles: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        handles.into_iter().map(|h| h.join()).collect()
    });
    // The failure of the first block, for a report that changes as little as possible from run to run.
    let mut failure: Option<Box<Failure>> = None;
    for result in results {
        match result {
            Ok(Ok(counters)) => total.add(&counters),
            Ok(Err(f)) => {
                if failure.as_ref().is_none_or(|have| f.cluster < have.cluster) {
                    failure = Some(f);
                }
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    match failure {
        Some(f) => Err(f),
        None => Ok(total),
    }
}

/// The report of a refused launch.
pub(crate) fn refused(kernel: &Kernel, env_options: &crate::options::Options, error: &LaunchError) -> Report {
    Report {
        fault: Fault::Launch,
        message: error.to_string(),
        kernel: kernel.name().to_owned(),
        block: [0; 3],
        thread: None,
        warp: 0,
        lane: 0,
        place: None,
        other: None,
        schedule: env_options.schedule,
        tma: env_options.tma,
    }
}

/// The report of a panic inside the emulator.
pub(crate) fn internal(env: &Env<'_>, panic: &(dyn std::any::Any + Send)) -> Report {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    Report {
        fault: Fault::Internal,
        message: format!("error inside the emulator: {}", text.unwrap_or("no message")),
        kernel: env.program.functions[env.function].name.clone(),
        block: [0; 3],
        thread: None,
        warp: 0,
        lane: 0,
        place: None,
        other: None,
        schedule: env.options.schedule,
        tma: env.options.tma,
    }
}

/// The report of a failed launch.
pub(crate) fn report(env: &Env<'_>, f: Failure) -> Report {
    let Failure { problem, cluster, cta, thread, pc } = f;
    Report {
        fault: problem.fault,
        message: problem.message,
        kernel: env.program.functions[env.function].name.clone(),
        block: block_coords(env, cluster, cta),
        thread: thread.map(|t| coords(t, env.block)),
        warp: thread.unwrap_or(0) / 32,
        lane: thread.unwrap_or(0) % 32,
        place: Some(env.program.place(pc)),
        other: problem.other.map(|pc| env.program.place(pc)),
        schedule: env.options.schedule,
        tma: env.options.tma,
    }
}
