//! Ordering through memory: fences, and the clocks that strong writes release and strong reads acquire.

use super::Machine;
use super::warp::{L64, Warp, lanes};
use crate::isa::moves::Space;
use crate::race::clock::Clock;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Machine<'_> {
    /// A fence: what strong reads saw becomes known, and what is known now is what later strong writes release.
    pub fn fence(&mut self, w: &Warp, mask: u32) {
        if !self.clocks.on() {
            return;
        }
        for lane in lanes(mask) {
            let thread = w.thread0 as usize + lane;
            if let Some(seen) = self.clocks.threads[thread].acquire.take() {
                self.clocks.acquire(thread, 1, &seen);
            }
            let t = &mut self.clocks.threads[thread];
            t.release = Some((Arc::clone(&t.base), t.own, t.fenced));
            t.own += 1;
        }
    }

    /// The clock a thread releases by a strong write: all it knows, or what it knew at its last fence.
    fn released(&mut self, thread: usize, now: bool) -> Option<Arc<Clock>> {
        let t = &mut self.clocks.threads[thread];
        let (base, own, fenced) = if now {
            t.own += 1;
            (Arc::clone(&t.base), t.own - 1, t.fenced)
        } else {
            t.release.clone()?
        };
        let mut clock = (*base).clone();
        clock.hb[thread] = clock.hb[thread].max(own);
        if let Some(px) = clock.px.get_mut(thread) {
            *px = (*px).max(fenced);
        }
        Some(Arc::new(clock))
    }

    /// Strong writes of the lanes of `mask`. A read-modify-write adds to what the location holds, a plain write replaces it.
    pub fn strong_write(&mut self, w: &Warp, space: Space, at: &L64, mask: u32, update: bool, release: bool) {
        if !self.clocks.on() {
            return;
        }
        for lane in lanes(mask) {
            let thread = w.thread0 as usize + lane;
            let (space, address) = if space == Space::Generic { Space::of(at[lane]) } else { (space, at[lane]) };
            let clock = self.released(thread, release);
            match space {
                Space::Shared => {
                    let Some((rank, low)) = self.split_shared(address) else { continue };
                    let sync = &mut self.ctas[rank].shared.sync;
                    match clock {
                        Some(clock) if update => sync.entry(low).or_default().join(&clock),
                        Some(clock) => {
                            let entry = sync.entry(low).or_default();
                            *entry = Default::default();
                            entry.join(&clock);
                        }
                        None if !update && !sync.is_empty() => {
                            sync.remove(&low);
                        }
                        None => {}
                    }
                }
                Space::Global | Space::Const => {
                    if clock.is_none() && (update || !self.env.sync_used.load(Ordering::Relaxed)) {
                        continue;
                    }
                    let mut sync = self.env.sync.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    let Some(clock) = clock else {
                        sync.remove(&address);
                        continue;
                    };
                    self.env.sync_used.store(true, Ordering::Relaxed);
                    let entry = sync.entry(address).or_default();
                    if !update {
                        entry.clear();
                    }
                    match entry.iter_mut().find(|(c, _)| *c == self.index) {
                        Some((_, have)) => Arc::make_mut(have).join(&clock),
                        None => entry.push((self.index, clock)),
                    }
                }
                _ => {}
            }
        }
    }

    /// Strong reads of the lanes of `mask`: known at once with `acquire`, otherwise at the thread's next fence.
    pub fn strong_read(&mut self, w: &Warp, space: Space, at: &L64, mask: u32, acquire: bool) {
        if !self.clocks.on() {
            return;
        }
        for lane in lanes(mask) {
            let thread = w.thread0 as usize + lane;
            let (space, address) = if space == Space::Generic { Space::of(at[lane]) } else { (space, at[lane]) };
            match space {
                Space::Shared => {
                    let Some((rank, low)) = self.split_shared(address) else { continue };
                    if let Some(clock) = self.ctas[rank].shared.sync.get(&low).and_then(|s| s.clock.clone()) {
                        self.see(thread, self.index, &clock, acquire);
                    }
                }
                Space::Global | Space::Const if self.env.sync_used.load(Ordering::Relaxed) => {
                    let found = {
                        let sync = self.env.sync.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        sync.get(&address).cloned()
                    };
                    for (cluster, clock) in found.into_iter().flatten() {
                        self.see(thread, cluster, &clock, acquire);
                    }
                }
                _ => {}
            }
        }
    }

    /// A thread saw a released clock.
    pub fn see(&mut self, thread: usize, cluster: u32, clock: &Arc<Clock>, acquire: bool) {
        if acquire {
            return self.clocks.acquire_from(thread, 1, cluster, clock);
        }
        let me = self.index;
        let actors = clock.hb.len();
        let proxy = !clock.px.is_empty();
        let pending = self.clocks.threads[thread].acquire.get_or_insert_with(|| Arc::new(Clock::new(actors, proxy)));
        Arc::make_mut(pending).join_from(me, cluster, clock);
    }
}
