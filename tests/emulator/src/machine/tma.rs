//! The bulk copy engine: loads into shared memory that complete on an mbarrier, and stores that complete by group.
//!
//! A load is queued at issue and runs when the option says: at once, when nothing else can run, or at random. A store reads shared
//! memory when its group is waited for, and writes global memory when the full wait (or the exit) comes.

use super::async_access::{Actor, Fetched, Hint};
use super::warp::{Warp, lanes};
use super::{Machine, TMA_ACTORS, Trouble, trouble};
use crate::isa::atomic::{self, Fun};
use crate::isa::ty::{SHARED_BASE, Ty};
use crate::options::TmaCompletion;
use crate::race::{ATOMIC, READ, WRITE, clock::Clock};
use crate::report::Fault;
use crate::tensor_map::{Decoded, Swizzle};
use std::collections::VecDeque;
use std::sync::Arc;

/// The global (or for copies between CTAs the shared) side of a bulk copy.
#[derive(Clone, Debug)]
pub(crate) enum Far {
    Tensor {
        map: Box<Decoded>,
        coords: [i32; 5],
    },
    Linear {
        address: u64,
    },
    Shared {
        rank: usize,
        offset: usize,
    },
    /// What an asynchronous store carries.
    Value(Vec<u8>),
}

/// A load under way.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    pub from: Far,
    pub bytes: usize,
    /// CTAs that receive it, and where in each.
    pub ranks: Vec<usize>,
    pub offset: usize,
    pub mbar: u32,
    pub mbar_rank: Option<usize>,
    pub known: Arc<Clock>,
    pub site: u32,
    /// CTA and thread that issued it.
    pub cta: u32,
    pub thread: u32,
}

impl Pending {
    pub fn targets(&self, rank: usize) -> bool {
        self.ranks.contains(&rank)
    }
}

/// A store or reduction to global memory.
#[derive(Clone, Debug)]
pub(crate) struct BulkStore {
    pub to: Far,
    pub bytes: usize,
    pub rank: usize,
    pub offset: usize,
    pub reduce: Option<(Fun, Ty)>,
    pub known: Arc<Clock>,
    /// The last step of every actor before it was issued.
    pub before: Vec<u32>,
    pub site: u32,
    /// What was read from shared memory, once it was.
    pub data: Option<Vec<u8>>,
}

/// Bulk groups of one thread.
#[derive(Clone, Debug, Default)]
pub(crate) struct LaneBulk {
    pub open: Vec<BulkStore>,
    pub groups: VecDeque<Vec<BulkStore>>,
}

/// Bulk groups of the lanes of a warp; made on first use.
#[derive(Clone, Debug, Default)]
pub(crate) struct WarpBulk(pub Vec<LaneBulk>);

impl WarpBulk {
    pub fn lane(&mut self, lane: usize) -> &mut LaneBulk {
        if self.0.is_empty() {
            self.0 = vec![LaneBulk::default(); 32];
        }
        &mut self.0[lane]
    }
}

/// Stores whose shared memory has not been read when their thread exits.
pub(crate) fn check_exit(w: &Warp, mask: u32) -> Result<(), Trouble> {
    for lane in lanes(mask) {
        let Some(bulk) = w.bulk.0.get(lane) else { continue };
        if let Some(op) = bulk.open.iter().chain(bulk.groups.iter().flatten()).find(|op| op.data.is_none()) {
            let text = format!("thread exits with a bulk store of {} bytes not waited for", op.bytes);
            return Err(trouble(Fault::ExitState, text).at_lane(lane).other(op.site));
        }
    }
    Ok(())
}

/// A row of a tensor box: where it lies on both sides.
struct Row {
    /// Byte in the packed box.
    packed: usize,
    /// Global address of the row's first element inside the tensor, how many bytes it has there, and where they begin in the row.
    global: Option<(u64, usize, usize)>,
}

/// The rows of the box at `coords`.
fn rows(map: &Decoded, coords: &[i32; 5]) -> Vec<Row> {
    let element = map.element.bytes();
    let inner = map.box_dims[0] as usize * element as usize;
    let count: usize = map.box_dims[1..].iter().map(|&b| b as usize).product();
    let low = i64::from(coords[0]).max(0);
    let high = (i64::from(coords[0]) + i64::from(map.box_dims[0])).min(map.dims[0] as i64);
    let mut out = Vec::with_capacity(count);
    for i in 0..count {
        let (mut rest, mut inside, mut address) = (i, low < high, map.base);
        for d in 1..5 {
            let at = i64::from(coords[d]) + (rest % map.box_dims[d] as usize) as i64;
            rest /= map.box_dims[d] as usize;
            inside &= at >= 0 && at < map.dims[d] as i64;
            address = address.wrapping_add((at as u64).wrapping_mul(map.strides[d]));
        }
        let global = inside.then(|| {
            let skip = ((low - i64::from(coords[0])) as usize) * element as usize;
            (address.wrapping_add(low as u64 * element), (high - low) as usize * element as usize, skip)
        });
        out.push(Row { packed: i * inner, global });
    }
    out
}

/// The offset in the window of byte `at` of a packed box placed at `offset`.
fn swizzled(swizzle: Swizzle, offset: usize, at: usize) -> usize {
    (swizzle.apply((offset + at) as u32 + SHARED_BASE) - SHARED_BASE) as usize
}

impl Machine<'_> {
    /// Queues a load, or runs it.
    pub fn issue_load(&mut self, op: Pending) -> Result<(), Trouble> {
        if let Some(&rank) = op.ranks.iter().find(|&&r| self.ctas[r].live == 0) {
            return Err(trouble(Fault::ExitState, format!("TMA load into CTA {rank}, which has exited")));
        }
        if self.env.options.tma == TmaCompletion::Eager {
            return self.complete_load(op);
        }
        self.pending.push(op);
        Ok(())
    }

    /// Runs one queued load: the oldest, or a random one.
    pub fn complete_one(&mut self) -> Result<bool, Trouble> {
        if self.pending.is_empty() {
            return Ok(false);
        }
        let i = if self.env.options.tma == TmaCompletion::Random { self.rng.below(self.pending.len()) } else { 0 };
        let op = self.pending.remove(i);
        self.complete_load(op)?;
        Ok(true)
    }

    pub fn complete_load(&mut self, op: Pending) -> Result<(), Trouble> {
        let place = (op.site, op.cta, op.thread);
        self.load(op).map_err(|mut t| {
            t.pc.get_or_insert(place.0);
            t.thread.get_or_insert((place.1, Some(place.2)));
            t
        })
    }

    fn load(&mut self, op: Pending) -> Result<(), Trouble> {
        // One actor per receiving CTA.
        let mut actors = Vec::new();
        for &rank in &op.ranks {
            let cta = &mut self.ctas[rank];
            cta.next_tma = (cta.next_tma + 1) % TMA_ACTORS;
            let n = cta.next_tma;
            let actor = self.actor(rank as u32, n);
            actors.push(self.clocks.start(actor, &op.known));
        }
        let (id, step, _) = actors[0];
        let reader = Actor { id, step, known: &op.known, site: op.site, hint: Hint::None };
        match &op.from {
            Far::Tensor { map, coords } => {
                let inner = map.box_dims[0] as usize * map.element.bytes() as usize;
                let fill = if map.nan_fill { nan_pattern(map) } else { [0; 16] };
                let rows = rows(map, coords);
                let mut data = Fetched::new(rows.len() * inner, fill);
                for row in &rows {
                    if let Some((address, n, skip)) = row.global {
                        self.read_global(&reader, "TMA load", address, &mut data, row.packed + skip, n)?;
                    }
                }
                let tag = map.swizzle as u8 + 1;
                // Where the swizzle stays inside the box the whole box is one range, with its chunks in another order.
                let whole = map.swizzle == Swizzle::None || (op.offset | data.bytes.len()).is_multiple_of(128);
                if whole && map.swizzle != Swizzle::None {
                    data = data.reordered(|at| swizzled(map.swizzle, op.offset, at) - op.offset);
                }
                for (&rank, (id, step, _)) in op.ranks.iter().zip(&actors) {
                    let writer = Actor { id: *id, step: *step, known: &op.known, site: op.site, hint: Hint::None };
                    if whole {
                        self.write_shared(&writer, rank, op.offset, &data, tag)?;
                        continue;
                    }
                    for at in (0..data.bytes.len()).step_by(16) {
                        self.write_shared(&writer, rank, swizzled(map.swizzle, op.offset, at), &data.part(at, 16), tag)?;
                    }
                }
            }
            Far::Linear { .. } | Far::Shared { .. } | Far::Value(_) => {
                let mut data = Fetched::new(op.bytes, [0; 16]);
                match &op.from {
                    &Far::Linear { address } => self.read_global(&reader, "bulk load", address, &mut data, 0, op.bytes)?,
                    &Far::Shared { rank, offset } => {
                        self.check_shared(&reader, rank, offset, op.bytes, READ)?;
                        let shared = &self.ctas[rank].shared;
                        data.put(0, &shared.data[offset..offset + op.bytes], |start, n| shared.uninitialised(offset + start, n));
                    }
                    Far::Value(bytes) => data.put(0, bytes, |_, _| None),
                    Far::Tensor { .. } => {}
                }
                for (&rank, (id, step, _)) in op.ranks.iter().zip(&actors) {
                    let writer = Actor { id: *id, step: *step, known: &op.known, site: op.site, hint: Hint::None };
                    // A flat copy may bring rows that are swizzled already: no tag.
                    self.write_shared(&writer, rank, op.offset, &data, 0)?;
                }
            }
        }
        for (&rank, (id, step, after)) in op.ranks.iter().zip(&actors) {
            let rank = op.mbar_rank.unwrap_or(rank);
            self.mbar(rank, op.mbar)?;
            self.mbar_touch_async(rank, op.mbar, *id, *step, &op.known, op.site)?;
            if self.clocks.on() {
                self.mbar(rank, op.mbar)?.clock.join(after);
            }
            self.mbar_tx(rank, op.mbar, -(op.bytes as i64))?;
        }
        Ok(())
    }

    /// Reads the shared memory of a store.
    fn read_store(&mut self, w: &Warp, lane: usize, op: &mut BulkStore) -> Result<(), Trouble> {
        if op.data.is_some() {
            return Ok(());
        }
        let actor = self.actor(w.cta, TMA_ACTORS);
        let (id, step, after) = self.clocks.start(actor, &op.known);
        let reader = Actor { id, step, known: &op.known, site: op.site, hint: Hint::Issued(&op.before) };
        let mut data = vec![0; op.bytes];
        match &op.to {
            Far::Tensor { map, coords } => {
                let inner = map.box_dims[0] as usize * map.element.bytes() as usize;
                let mut sweep = self.sweep(&reader, READ);
                for row in rows(map, coords) {
                    // Only what lies inside the tensor is needed, but the engine reads the whole box.
                    for c in (0..inner).step_by(16) {
                        let at = swizzled(map.swizzle, op.offset, row.packed + c);
                        self.sweep_shared(&reader, op.rank, at, 16, &mut sweep)?;
                        let used = row.global.is_some_and(|(_, n, skip)| c < skip + n && c + 16 > skip);
                        if used {
                            self.check_shared_init("TMA store", op.rank, at, 16)?;
                        }
                        data[row.packed + c..row.packed + c + 16].copy_from_slice(&self.ctas[op.rank].shared.data[at..at + 16]);
                    }
                }
            }
            _ => {
                self.check_shared(&reader, op.rank, op.offset, op.bytes, READ)?;
                self.check_shared_init("bulk store", op.rank, op.offset, op.bytes)?;
                data.copy_from_slice(&self.ctas[op.rank].shared.data[op.offset..op.offset + op.bytes]);
            }
        }
        op.data = Some(data);
        self.clocks.acquire(w.thread0 as usize + lane, 1, &after);
        Ok(())
    }

    /// Writes the global memory of a store that has been read.
    fn write_store(&mut self, w: &Warp, lane: usize, op: &BulkStore) -> Result<(), Trouble> {
        let Some(data) = &op.data else { return Ok(()) };
        let actor = self.actor(w.cta, TMA_ACTORS + 1);
        let (id, step, after) = self.clocks.start(actor, &op.known);
        let writer = Actor { id, step, known: &op.known, site: op.site, hint: Hint::None };
        let (kind, what) = match op.reduce {
            Some(_) => (READ | WRITE | ATOMIC, "bulk reduction"),
            None => (WRITE, "TMA store"),
        };
        let change = |part: &mut [u8], from: &[u8]| match op.reduce {
            None => part.copy_from_slice(from),
            Some((fun, ty)) => {
                let n = ty.bytes() as usize;
                for (old, new) in part.chunks_exact_mut(n).zip(from.chunks_exact(n)) {
                    let value = |b: &[u8]| b.iter().rev().fold(0u64, |v, &b| v << 8 | u64::from(b));
                    old.copy_from_slice(&atomic::apply(fun, ty, value(old), value(new), 0).to_le_bytes()[..n]);
                }
            }
        };
        match &op.to {
            Far::Tensor { map, coords } => {
                for row in rows(map, coords) {
                    let Some((address, n, skip)) = row.global else { continue };
                    // The last 16 bytes of a row are stored whole, even if it ends among them.
                    let n = if op.reduce.is_none() { (skip + n).next_multiple_of(16) - skip } else { n };
                    let from = &data[row.packed + skip..row.packed + skip + n];
                    self.write_global(&writer, what, address, n, kind, &mut |part, at| change(part, &from[at..at + part.len()]))?;
                }
            }
            Far::Linear { address } => {
                self.write_global(&writer, what, *address, op.bytes, kind, &mut |part, at| change(part, &data[at..at + part.len()]))?;
            }
            Far::Shared { .. } | Far::Value(_) => {}
        }
        self.clocks.acquire(w.thread0 as usize + lane, 1, &after);
        Ok(())
    }

    /// `cp.async.bulk.wait_group{.read} n` of one lane.
    pub fn bulk_wait(&mut self, w: &mut Warp, lane: usize, n: usize, read_only: bool) -> Result<(), Trouble> {
        if w.bulk.0.is_empty() {
            return Ok(());
        }
        let mut groups = std::mem::take(&mut w.bulk.0[lane].groups);
        let over = groups.len().saturating_sub(n);
        for group in groups.iter_mut().take(over) {
            for op in group {
                self.read_store(w, lane, op).map_err(|t| at_site(t, op.site))?;
            }
        }
        if !read_only {
            for group in groups.drain(..over) {
                for op in &group {
                    self.write_store(w, lane, op).map_err(|t| at_site(t, op.site))?;
                }
            }
        }
        w.bulk.0[lane].groups = groups;
        Ok(())
    }

    /// At exit: what was read is written; what was not read is performed too, if nobody checks for it.
    pub fn finish_bulk(&mut self, w: &mut Warp, mask: u32) -> Result<(), Trouble> {
        if w.bulk.0.is_empty() {
            return Ok(());
        }
        for lane in lanes(mask) {
            let open = std::mem::take(&mut w.bulk.0[lane].open);
            w.bulk.0[lane].groups.push_back(open);
            self.bulk_wait(w, lane, 0, false)?;
        }
        Ok(())
    }
}

fn at_site(mut t: Trouble, pc: u32) -> Trouble {
    t.pc.get_or_insert(pc);
    t
}

/// NaN of the map's element type, repeated over 16 bytes.
fn nan_pattern(map: &Decoded) -> [u8; 16] {
    use crate::tensor_map::ElementType as E;
    match map.element {
        E::F16 | E::Bf16 => {
            u128::from_le_bytes([0xff, 0x7f, 0xff, 0x7f, 0xff, 0x7f, 0xff, 0x7f, 0xff, 0x7f, 0xff, 0x7f, 0xff, 0x7f, 0xff, 0x7f])
        }
        E::F64 => 0x7fff_ffff_ffff_ffff_7fff_ffff_ffff_ffff,
        _ => 0x7fff_ffff_7fff_ffff_7fff_ffff_7fff_ffff,
    }
    .to_le_bytes()
}
