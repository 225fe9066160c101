//! Loads and stores of threads: bounds, alignment, initialisation, races; any state space.

use super::warp::{L64, Lanes, Warp, lanes};
use super::{Machine, Trouble, trouble};
use crate::isa::moves::Space;
use crate::memory::global::{PAGE, Page};
use crate::race::{self, ATOMIC, Access, Cell, Conflict, READ, WRITE};
use crate::report::Fault;
use std::sync::MutexGuard;

/// The bytes of one lane's access, little-endian; at most 16.
pub(crate) type Bytes = [u128; 32];

/// `read` or `write`, for messages.
pub(crate) fn verb(kind: u8) -> &'static str {
    match (kind & WRITE != 0, kind & ATOMIC != 0) {
        (true, true) => "atomic write",
        (true, false) => "write",
        (false, true) => "atomic read",
        (false, false) => "read",
    }
}

fn misaligned(kind: u8, n: u32, place: String) -> Trouble {
    trouble(Fault::Misaligned, format!("misaligned {n}-byte {} at {place}", verb(kind)))
}

/// Lanes in the order of the schedule.
pub(crate) struct Order {
    up: Lanes,
    down: u32,
    reverse: bool,
}

impl Iterator for Order {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        if !self.reverse {
            return self.up.next();
        }
        if self.down == 0 {
            return None;
        }
        let lane = 31 - self.down.leading_zeros() as usize;
        self.down &= !(1 << lane);
        Some(lane)
    }
}

/// What happens to the bytes a lane addresses: called with the lane and its bytes, returns what is stored (if it stores).
pub(crate) trait Touch {
    /// READ, WRITE, ATOMIC bits.
    const KIND: u8;
    fn touch(&mut self, lane: usize, old: u128) -> Result<u128, Trouble>;
}

/// A load.
pub(crate) struct Load<'o>(pub &'o mut Bytes);

impl Touch for Load<'_> {
    const KIND: u8 = READ;

    #[inline(always)]
    fn touch(&mut self, lane: usize, old: u128) -> Result<u128, Trouble> {
        self.0[lane] = old;
        Ok(0)
    }
}

/// A store.
pub(crate) struct Store<'v>(pub &'v Bytes);

impl Touch for Store<'_> {
    const KIND: u8 = WRITE;

    #[inline(always)]
    fn touch(&mut self, lane: usize, _: u128) -> Result<u128, Trouble> {
        Ok(self.0[lane])
    }
}

/// A read-modify-write.
pub(crate) struct Update<F>(pub F);

impl<F: FnMut(usize, u128) -> Result<u128, Trouble>> Touch for Update<F> {
    const KIND: u8 = READ | WRITE;

    #[inline(always)]
    fn touch(&mut self, lane: usize, old: u128) -> Result<u128, Trouble> {
        (self.0)(lane, old)
    }
}

#[inline(always)]
fn get(bytes: &[u8]) -> u128 {
    match *bytes {
        [a] => a.into(),
        [a, b] => u16::from_le_bytes([a, b]).into(),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).into(),
        [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]).into(),
        _ => {
            let mut out = [0; 16];
            out[..bytes.len()].copy_from_slice(bytes);
            u128::from_le_bytes(out)
        }
    }
}

#[inline(always)]
fn put(bytes: &mut [u8], v: u128) {
    match bytes.len() {
        1 => bytes[0] = v as u8,
        4 => bytes.copy_from_slice(&(v as u32).to_le_bytes()),
        8 => bytes.copy_from_slice(&(v as u64).to_le_bytes()),
        n => bytes.copy_from_slice(&v.to_le_bytes()[..n]),
    }
}

impl<'g> Machine<'g> {
    #[inline]
    pub fn order(&self, mask: u32) -> Order {
        Order { up: lanes(mask), down: mask, reverse: self.reverse }
    }

    /// Performs `n`-byte accesses of the lanes of `mask`. `strong` marks accesses that do not race with each other.
    pub fn access<T: Touch>(
        &mut self,
        w: &mut Warp,
        space: Space,
        at: &L64,
        mask: u32,
        n: u32,
        strong: bool,
        t: &mut T,
    ) -> Result<(), Trouble> {
        let kind = T::KIND | if strong { ATOMIC } else { 0 };
        match space {
            Space::Generic => {
                let mut left = mask;
                while left != 0 {
                    let first = left.trailing_zeros() as usize;
                    let (space, _) = Space::of(at[first]);
                    let mut group = 0;
                    let mut inner = *at;
                    for lane in lanes(left) {
                        let (s, a) = Space::of(at[lane]);
                        if s == space {
                            group |= 1 << lane;
                            inner[lane] = a;
                        }
                    }
                    left &= !group;
                    self.access(w, space, &inner, group, n, strong, t)?;
                }
                Ok(())
            }
            Space::Shared => self.access_shared(w, at, mask, n, kind, t),
            Space::Local => access_local(w, at, mask, n, kind, self.check_init, t),
            Space::Param => self.access_param(w, at, mask, n, kind, t),
            Space::Global | Space::Const => self.access_global(w, at, mask, n, kind, t),
        }
    }

    #[inline]
    fn access_shared<T: Touch>(&mut self, w: &Warp, at: &L64, mask: u32, n: u32, kind: u8, t: &mut T) -> Result<(), Trouble> {
        let watch = self.clocks.on();
        let check_init = self.check_init && kind & READ != 0;
        let mut dice = self.clocks.next_dice();
        for lane in self.order(mask) {
            let address = at[lane];
            let found = self.split_shared(address).and_then(|(rank, low)| Some((rank, self.ctas[rank].shared.offset(low, n)?)));
            let Some((rank, offset)) = found else { return Err(self.shared_out_of_bounds(address, n, kind).at_lane(lane)) };
            if !address.is_multiple_of(u64::from(n)) {
                return Err(misaligned(kind, n, self.shared_name(rank, offset)).at_lane(lane));
            }
            if watch && let Some(site) = w.cp_async.overlapping(lane, address, n) {
                let (name, me) = (self.shared_name(rank, offset), self.actor_name((w.thread0 as usize + lane) as u16));
                let text = format!("data race on {name}: {} by {me} unordered with its own cp.async that is under way", verb(kind));
                return Err(trouble(Fault::DataRace, text).at_lane(lane).other(site));
            }
            let shared = &mut self.ctas[rank].shared;
            let len = n as usize;
            if check_init && let Some(byte) = shared.uninitialised(offset, len) {
                let reader = self.actor_name((w.thread0 as usize + lane) as u16);
                return Err(self.uninitialised_shared(&reader, n as usize, rank, byte).at_lane(lane));
            }
            let new = t.touch(lane, if kind & READ != 0 { get(&shared.data[offset..offset + len]) } else { 0 })?;
            if watch {
                let me = w.thread0 as usize + lane;
                let repeats = kind == WRITE && shared.data[offset..offset + len] == new.to_le_bytes()[..len];
                let access = Access { repeats, ..self.clocks.thread_access(me, kind, self.site) };
                if let Some((at, c)) = shared.check(offset, len, &access, self.clocks.watch, &mut dice) {
                    return Err(self.conflict(c, me as u16, kind, self.shared_name(rank, at), false).at_lane(lane));
                }
            }
            let shared = &mut self.ctas[rank].shared;
            if kind & WRITE != 0 {
                put(&mut shared.data[offset..offset + len], new);
                shared.mark(offset, len);
                shared.tags[offset / 128] = 0;
            }
        }
        Ok(())
    }

    fn shared_out_of_bounds(&self, address: u64, n: u32, kind: u8) -> Trouble {
        let what = match self.split_shared(address) {
            Some((rank, low)) => {
                let size = self.ctas[rank].shared.data.len();
                let offset = i64::from(low) - i64::from(crate::isa::ty::SHARED_BASE);
                let of = if self.ctas.len() > 1 { format!(" of CTA {rank}") } else { String::new() };
                format!("shared window{of} of {size} bytes, offset {offset}")
            }
            None => format!("shared address {address:#x}, which is in no CTA of the cluster"),
        };
        trouble(Fault::OutOfBounds, format!("out-of-bounds {n}-byte {} at {what}", verb(kind)))
    }

    fn access_param<T: Touch>(&mut self, w: &mut Warp, at: &L64, mask: u32, n: u32, kind: u8, t: &mut T) -> Result<(), Trouble> {
        let depth = w.frames[w.cur.frame as usize].depth;
        let entry = depth == 0;
        let blob = self.env.params;
        for lane in self.order(mask) {
            let address = at[lane];
            let frame = &mut w.frames[w.cur.frame as usize];
            let size = if entry { blob.len() } else { frame.params.len() / 32 } as u64;
            // The entry's own parameters are the blob; variables of calls it makes lie behind.
            let in_blob = entry && address.saturating_add(n.into()) <= blob.len() as u64;
            let total = if entry { blob.len() as u64 + (frame.params.len() / 32) as u64 } else { size };
            if address.checked_add(u64::from(n)).is_none_or(|end| end > total) || in_blob && kind & WRITE != 0 {
                return Err(trouble(
                    Fault::OutOfBounds,
                    format!("out-of-bounds {n}-byte {} at parameters of {size} bytes, offset {address}", verb(kind)),
                )
                .at_lane(lane));
            }
            if !address.is_multiple_of(u64::from(n)) {
                return Err(misaligned(kind, n, format!("parameter offset {address}")).at_lane(lane));
            }
            let len = n as usize;
            if in_blob {
                let start = address as usize;
                t.touch(lane, get(&blob[start..start + len]))?;
                continue;
            }
            let stride = frame.params.len() / 32;
            let start = lane * stride + address as usize - if entry { blob.len() } else { 0 };
            let bytes = &mut frame.params[start..start + len];
            let new = t.touch(lane, get(bytes))?;
            if kind & WRITE != 0 {
                put(bytes, new);
            }
        }
        Ok(())
    }

    #[inline]
    fn access_global<T: Touch>(&mut self, w: &Warp, at: &L64, mask: u32, n: u32, kind: u8, t: &mut T) -> Result<(), Trouble> {
        let env = self.env;
        let watch = self.clocks.on();
        let check_init = self.check_init && kind & READ != 0;
        let len = n as usize;
        let mut dice = self.clocks.next_dice();
        // The buffer and page of the last lane: neighbours usually share them.
        let mut buffer = (0, 0, 0u64);
        let mut held: Option<(usize, usize, MutexGuard<'g, Page>)> = None;
        for lane in self.order(mask) {
            let address = at[lane];
            let offset = address.wrapping_sub(buffer.1);
            if held.is_none() || offset >= buffer.2 || buffer.2 - offset < u64::from(n) {
                match env.global.find(address, n.into()) {
                    Some((index, _)) => {
                        let b = env.global.buffer(index);
                        buffer = (index, b.base, b.size);
                    }
                    None => {
                        let text = format!("out-of-bounds {n}-byte {} at {}", verb(kind), env.global.describe(address));
                        return Err(trouble(Fault::OutOfBounds, text).at_lane(lane));
                    }
                }
            }
            let (index, base, size) = buffer;
            let offset = address - base;
            if !address.is_multiple_of(u64::from(n)) {
                return Err(misaligned(kind, n, format!("global buffer of {size} bytes, offset {offset}")).at_lane(lane));
            }
            let (page, start) = ((offset / PAGE as u64) as usize, (offset % PAGE as u64) as usize);
            if held.as_ref().is_none_or(|h| h.0 != index || h.1 != page) {
                // Two pages are never held at once: another worker may hold them in the other order.
                drop(held.take());
                if kind & WRITE != 0 && env.global.buffer(index).constant {
                    return Err(trouble(Fault::OutOfBounds, format!("{n}-byte {} to constant memory", verb(kind))).at_lane(lane));
                }
                held = Some((index, page, env.global.buffer(index).page(page)));
            }
            let Some((_, _, p)) = &mut held else { continue };
            if check_init && p.uninitialised(start, len).is_some() {
                let text = format!("uninitialised {n}-byte read at global buffer of {size} bytes, offset {offset}");
                return Err(trouble(Fault::Uninitialised, text).at_lane(lane));
            }
            if watch {
                let me = w.thread0 as usize + lane;
                let access = self.clocks.thread_access(me, kind, self.site);
                if let Some((at, c)) = p.check(env.launch, start, len, &access, self.clocks.watch, &mut dice) {
                    let at = offset + (at - start) as u64;
                    return Err(self.conflict(c, me as u16, kind, format!("global+{at:#x}"), true).at_lane(lane));
                }
            }
            let old = if kind & READ != 0 { get(&p.data[start..start + len]) } else { 0 };
            let new = t.touch(lane, old)?;
            if kind & WRITE != 0 {
                put(&mut p.data[start..start + len], new);
                crate::memory::mark(&mut p.init, start, len);
            }
            let traffic = &mut self.counters.traffic[index];
            traffic.loaded += if kind & READ != 0 { u64::from(n) } else { 0 };
            traffic.stored += if kind & WRITE != 0 { u64::from(n) } else { 0 };
        }
        Ok(())
    }

    /// The report of a conflict of `actor` with an earlier access.
    pub fn conflict(&self, c: Conflict, actor: u16, kind: u8, place: String, global: bool) -> Trouble {
        let me = self.actor_name(actor);
        let (Conflict::Race(cell) | Conflict::Proxy(cell)) = c;
        let foreign = cell.cluster != self.clocks.cluster;
        let other = if foreign { self.foreign_name(&cell) } else { self.actor_name(cell.actor) };
        if let Conflict::Proxy(_) = c {
            let text = format!("missing fence.proxy.async: {me} reads {place} written by {other}");
            return trouble(Fault::MissingProxyFence, text).other(cell.site);
        }
        let earlier = format!("{}{}", if cell.kind & race::ASYNC != 0 { "async " } else { "" }, verb(cell.kind));
        let (fault, text) = if foreign && global {
            (Fault::InterBlockRace, format!("inter-block data race on {place}: {} by {me} conflicts with {earlier} by {other}", verb(kind)))
        } else if kind & race::ASYNC != 0 {
            let preposition = if kind & WRITE != 0 { "to" } else { "of" };
            let text = format!("async {} by {me} {preposition} {place} unordered with earlier {earlier} by {other}", verb(kind));
            (Fault::DataRace, text)
        } else {
            (Fault::DataRace, format!("data race on {place}: {} by {me} unordered with earlier {earlier} by {other}", verb(kind)))
        };
        trouble(fault, text).other(cell.site)
    }

    /// An actor of another cluster: its block.
    fn foreign_name(&self, cell: &Cell) -> String {
        let size = self.env.cluster.iter().product::<u32>();
        let threads = self.threads_per_cta() * size as usize;
        let per = if usize::from(cell.actor) < threads { self.threads_per_cta() } else { self.actors_per_cta };
        let n = if usize::from(cell.actor) < threads { usize::from(cell.actor) } else { usize::from(cell.actor) - threads };
        let coords = super::launch::block_coords(self.env, cell.cluster, (n / per) as u32);
        let grid = self.env.grid;
        let linear = u64::from(coords[0]) + u64::from(grid[0]) * (u64::from(coords[1]) + u64::from(grid[1]) * u64::from(coords[2]));
        format!("block {linear}")
    }
}

fn access_local<T: Touch>(w: &mut Warp, at: &L64, mask: u32, n: u32, kind: u8, check_init: bool, t: &mut T) -> Result<(), Trouble> {
    for lane in lanes(mask) {
        let address = at[lane];
        let start = match w.local.find(lane, address, n) {
            Ok(start) => start,
            Err((base, size)) => {
                let offset = (address as i64).wrapping_sub(base.into());
                let text = format!("out-of-bounds {n}-byte {} at local frame of {size} bytes, offset {offset}", verb(kind));
                return Err(trouble(Fault::OutOfBounds, text).at_lane(lane));
            }
        };
        if !address.is_multiple_of(u64::from(n)) {
            return Err(misaligned(kind, n, format!("local address {address:#x}")).at_lane(lane));
        }
        let len = n as usize;
        if check_init && kind & READ != 0 && w.local.uninitialised(start, len) {
            return Err(trouble(Fault::Uninitialised, format!("uninitialised {n}-byte read at local address {address:#x}")).at_lane(lane));
        }
        let new = t.touch(lane, get(w.local.read(start, len)))?;
        if kind & WRITE != 0 {
            let bytes = new.to_le_bytes();
            w.local.write(start, &bytes[..len]);
        }
    }
    Ok(())
}
