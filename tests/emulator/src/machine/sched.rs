//! Scheduling: the warps of a cluster, the resident clusters of a worker, the workers of a launch.
//!
//! A worker runs one cluster until it is done or cannot go on by itself for a while (a spin on something another block will write);
//! then it brings in the next one, up to the number the device could hold at once. With a random schedule it mixes all residents from
//! the start.

use super::run::{self, Outcome};
use super::{Counters, Env, Machine, Problem, deadlock, launch, trouble};
use crate::options::{Schedule, TmaCompletion};
use crate::report::Fault;
use std::sync::atomic::{AtomicU32, Ordering};

/// Instructions a warp runs before another has its turn.
const SLICE: u32 = 4096;
/// Slices a cluster runs before another may be brought in.
const TURN: u32 = 256;

/// How a turn of a cluster ended.
enum Turn {
    Done,
    /// It could go on.
    More,
}

/// A fault and where it happened.
pub(crate) struct Failure {
    pub problem: Problem,
    pub cluster: u32,
    pub cta: u32,
    /// Linear thread in the block.
    pub thread: Option<u32>,
    pub pc: u32,
}

impl Machine<'_> {
    /// Picks the next warp that can run.
    fn next_warp(&mut self, last: usize) -> Option<usize> {
        let n = self.warps.len();
        if self.random {
            let start = self.rng.below(n);
            return (0..n).map(|i| (start + i) % n).find(|&i| self.warps[i].ready);
        }
        if self.reverse {
            return (0..n).map(|i| (last + n - i) % n).find(|&i| self.warps[i].ready);
        }
        (0..n).map(|i| (last + i) % n).find(|&i| self.warps[i].ready)
    }

    /// Runs the cluster for a while.
    fn turn(&mut self, slices: u32) -> Result<Turn, Box<Failure>> {
        let mut last = if self.reverse { self.warps.len() - 1 } else { 0 };
        for _ in 0..slices {
            if self.env.options.tma == TmaCompletion::Random && !self.pending.is_empty() && self.rng.below(3) == 0 {
                self.complete()?;
            }
            let Some(slot) = self.next_warp(last) else {
                if self.pending.is_empty() {
                    if self.warps.iter().any(deadlock::alive) {
                        let t = deadlock::report(self);
                        return Err(self.fail(*t, None));
                    }
                    return Ok(Turn::Done);
                }
                // Nobody can run: now a copy completes.
                self.complete()?;
                continue;
            };
            let budget = if self.random { 1 + self.rng.below(200) as u32 } else { SLICE };
            let mut w = std::mem::take(&mut self.warps[slot]);
            w.ids.clock = w.ids.clock.wrapping_add(1);
            let before = self.counters.warp_instructions;
            let result = run::run(self, &mut w, budget);
            // Wakes for the warp itself may still be queued.
            if !self.wakes.is_empty() {
                run::wake(self, &mut w);
            }
            let outcome = match result {
                Ok(outcome) => outcome,
                Err(t) => {
                    self.warps[slot] = w;
                    return Err(self.fail(*t, Some(slot)));
                }
            };
            match outcome {
                Outcome::Blocked => w.ready = w.others.iter().any(|g| g.state == super::warp::State::Ready),
                Outcome::Done => w.ready = false,
                Outcome::Yielded => {}
            }
            self.warps[slot] = w;
            last = if outcome == Outcome::Yielded || self.random {
                if self.reverse { (slot + self.warps.len() - 1) % self.warps.len() } else { (slot + 1) % self.warps.len() }
            } else {
                slot
            };
            let steps = self.counters.warp_instructions - before;
            let total = self.env.steps.fetch_add(steps, Ordering::Relaxed) + steps;
            if total > self.env.options.step_limit {
                let limit = self.env.options.step_limit;
                let t = trouble(
                    Fault::StepLimit,
                    format!("step limit of {limit} warp instructions reached: an endless loop, or raise Options::step_limit"),
                );
                return Err(self.fail(*t, Some(slot)));
            }
        }
        if self.env.stop.load(Ordering::Relaxed) { Ok(Turn::Done) } else { Ok(Turn::More) }
    }

    /// Completes one bulk copy, with its wakes.
    fn complete(&mut self) -> Result<(), Box<Failure>> {
        match self.complete_one() {
            Ok(_) => {
                let mut nobody = super::warp::Warp { slot: u32::MAX, ..Default::default() };
                run::wake(self, &mut nobody);
                Ok(())
            }
            Err(t) => Err(self.fail(*t, None)),
        }
    }

    /// Gives a fault its place.
    fn fail(&self, mut problem: Problem, slot: Option<usize>) -> Box<Failure> {
        let warp = slot.map(|s| &self.warps[s]);
        let lane = problem.lane.or_else(|| warp.filter(|w| w.cur.mask != 0).map(|w| w.cur.mask.trailing_zeros() as usize));
        let (cta, thread) = match (problem.thread, warp) {
            (Some((cta, thread)), _) => (cta, thread),
            (None, Some(w)) => (w.cta, lane.map(|l| w.index * 32 + l as u32)),
            (None, None) => (0, None),
        };
        problem.lane = lane;
        let pc = problem.pc.unwrap_or(self.site);
        Box::new(Failure { problem, cluster: self.index, cta, thread, pc })
    }
}

/// Runs clusters until none is left or one fails. `next` hands out cluster numbers.
pub(crate) fn work(env: &Env<'_>, next: &AtomicU32, clusters: u32, counters: &mut Counters) -> Result<(), Box<Failure>> {
    let resident = launch::resident_clusters(env);
    let mut machines: Vec<Machine<'_>> = Vec::new();
    let random = matches!(env.options.schedule, Schedule::Random(_));
    let mut rng = super::rng::Rng::new(if let Schedule::Random(seed) = env.options.schedule { seed } else { 0 });
    let mut at = 0;
    let mut dry = false;
    loop {
        if env.stop.load(Ordering::Relaxed) {
            break;
        }
        let want = if random { resident } else { 1 };
        while !dry && machines.len() < want.max(usize::from(machines.is_empty())) {
            match start(env, next, clusters, counters) {
                Some(machine) => machines.push(machine),
                None => dry = true,
            }
        }
        if machines.is_empty() {
            break;
        }
        let i = if random { rng.below(machines.len()) } else { at % machines.len() };
        let slices = if random { 1 + rng.below(16) as u32 } else { TURN };
        match machines[i].turn(slices) {
            Ok(Turn::Done) => {
                let machine = machines.swap_remove(i);
                counters.add(&machine.counters);
            }
            Ok(Turn::More) => {
                at += 1;
                // Still busy after a whole turn: perhaps it waits for a block that has not begun.
                if !random && !dry && machines.len() < resident && at % machines.len() == 0 {
                    match start(env, next, clusters, counters) {
                        Some(machine) => machines.push(machine),
                        None => dry = true,
                    }
                }
            }
            Err(failure) => {
                env.stop.store(true, Ordering::Relaxed);
                return Err(failure);
            }
        }
    }
    Ok(())
}

fn start<'e>(env: &'e Env<'e>, next: &AtomicU32, clusters: u32, counters: &Counters) -> Option<Machine<'e>> {
    let n = next.fetch_add(1, Ordering::Relaxed);
    if n >= clusters {
        // Do not let the counter run away.
        next.store(clusters, Ordering::Relaxed);
        return None;
    }
    let index = if env.options.schedule == Schedule::Reverse { clusters - 1 - n } else { n };
    Some(launch::machine(env, index, counters.traffic.len()))
}
