//! The report when threads are alive, none can run and nothing asynchronous is under way.

use super::warp::{State, Warp};
use super::{Machine, Trouble, run, trouble};
use crate::report::Fault;
use std::collections::BTreeMap;

/// What a group waits for, for grouping.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Mbarrier { rank: u32, offset: u32, parity: u8 },
    Barrier { cta: u32, id: u8 },
    Cluster,
    Wgmma { cta: u32, group: u32 },
    Warp,
}

/// Builds the report. Lanes of a warp that wait for each other come first: they explain the rest.
pub(crate) fn report(m: &Machine<'_>) -> Trouble {
    for w in &m.warps {
        let waits = |s: fn(&State) -> bool| w.others.iter().any(|g| s(&g.state));
        if waits(|s| matches!(s, State::Aligned | State::Collective(_))) {
            let mut t = run::divergence(m, w);
            t.thread = Some((w.cta, t.lane.map(|l| w.index * 32 + l as u32)));
            return t;
        }
    }
    let mut groups: BTreeMap<(What, u32), u32> = BTreeMap::new();
    let mut first: Option<(u32, u32, u32)> = None;
    for w in &m.warps {
        for g in w.others.iter().filter(|g| g.mask != 0) {
            let what = match g.state {
                State::Mbarrier { rank, offset, parity } => What::Mbarrier { rank, offset, parity },
                State::Barrier(id) => What::Barrier { cta: w.cta, id },
                State::ClusterBarrier => What::Cluster,
                State::Wgmma => What::Wgmma { cta: w.cta, group: w.index / 4 },
                State::Ready | State::Aligned | State::Collective(_) => What::Warp,
            };
            *groups.entry((what, g.pc)).or_default() += g.mask.count_ones();
            first.get_or_insert((w.cta, w.index * 32 + g.mask.trailing_zeros(), g.pc));
        }
    }
    let parts: Vec<String> = groups.iter().map(|((what, pc), n)| describe(m, what, *pc, *n)).collect();
    let mut t = trouble(Fault::Deadlock, format!("deadlock: {}", parts.join("; ")));
    if let Some((cta, thread, pc)) = first {
        (t.thread, t.pc) = (Some((cta, Some(thread))), Some(pc));
    }
    t
}

fn describe(m: &Machine<'_>, what: &What, pc: u32, n: u32) -> String {
    let place = m.env.program.place(pc).short();
    let threads = if n == 1 { "1 thread waits".to_owned() } else { format!("{n} threads wait") };
    match *what {
        What::Mbarrier { rank, offset, parity } => {
            let name = m.shared_name(rank as usize, offset as usize);
            let mut text = format!("{threads} on mbarrier {name} parity {parity} ({place})");
            if let Some(bar) = m.ctas[rank as usize].shared.mbars.get(&offset) {
                if bar.tx != 0 {
                    text += &format!(", {} bytes outstanding", bar.tx);
                }
                text += &format!(", {} of {} arrivals pending", bar.pending, bar.count);
            }
            text
        }
        What::Barrier { cta, id } => {
            let c = &m.ctas[cta as usize];
            let b = &c.barriers[usize::from(id)];
            let exited = c.threads - c.live;
            let missing = b.expected.saturating_sub(b.arrived);
            let mut text = format!("{threads} at barrier {id} ({place}), {missing} of {} threads missing", b.expected);
            if exited > 0 {
                text += &format!(", {exited} threads have exited");
            }
            text
        }
        What::Cluster => format!("{threads} at the cluster barrier ({place}), {} arrived", m.cluster_barrier.arrived),
        What::Wgmma { group, .. } => format!("{threads} for the other warps of warpgroup {group} to queue their wgmmas ({place})"),
        What::Warp => format!("{threads} for other lanes ({place})"),
    }
}

/// Whether a warp has lanes left.
pub(crate) fn alive(w: &Warp) -> bool {
    w.live != 0
}
