//! Vector clocks: what each actor of a cluster knows of every other.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What an actor knows: for every actor of its cluster the last step that happened before.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock {
    /// By actor: steps that happened before.
    pub hb: Vec<u32>,
    /// By actor: steps whose ordinary writes a proxy fence covers. Empty where the kernel uses no async proxy.
    pub px: Vec<u32>,
    /// The same for other clusters of the launch that this one synchronised with.
    pub foreign: Option<Arc<BTreeMap<u32, Arc<Clock>>>>,
}

fn max_into(to: &mut [u32], from: &[u32]) {
    for (t, f) in to.iter_mut().zip(from) {
        *t = (*t).max(*f);
    }
}

fn min_into(to: &mut [u32], from: &[u32]) {
    for (t, f) in to.iter_mut().zip(from) {
        *t = (*t).min(*f);
    }
}

impl Clock {
    pub fn new(actors: usize, proxy: bool) -> Self {
        Self { hb: vec![0; actors], px: vec![0; if proxy { actors } else { 0 }], foreign: None }
    }

    /// Learns all that `other`, a clock of the same cluster, knows.
    pub fn join(&mut self, other: &Clock) {
        max_into(&mut self.hb, &other.hb);
        max_into(&mut self.px, &other.px);
        self.join_foreign(&other.foreign);
    }

    /// Forgets what `other`, a clock of the same cluster, does not know.
    pub fn keep_common(&mut self, other: &Clock) {
        min_into(&mut self.hb, &other.hb);
        min_into(&mut self.px, &other.px);
        let (Some(mine), Some(theirs)) = (&mut self.foreign, &other.foreign) else {
            self.foreign = None;
            return;
        };
        if Arc::ptr_eq(mine, theirs) {
            return;
        }
        let mine = Arc::make_mut(mine);
        mine.retain(|cluster, _| theirs.contains_key(cluster));
        for (cluster, clock) in mine {
            let clock = Arc::make_mut(clock);
            min_into(&mut clock.hb, &theirs[cluster].hb);
            min_into(&mut clock.px, &theirs[cluster].px);
        }
    }

    fn join_foreign(&mut self, other: &Option<Arc<BTreeMap<u32, Arc<Clock>>>>) {
        let Some(theirs) = other else { return };
        match &mut self.foreign {
            None => self.foreign = Some(Arc::clone(theirs)),
            Some(mine) if Arc::ptr_eq(mine, theirs) => {}
            Some(mine) => {
                let mine = Arc::make_mut(mine);
                for (&cluster, clock) in theirs.iter() {
                    join_cluster(mine, cluster, clock);
                }
            }
        }
    }

    /// Learns what cluster `cluster` knew when it released `other`. `me` is the cluster this clock belongs to.
    pub fn join_from(&mut self, me: u32, cluster: u32, other: &Arc<Clock>) {
        if me == cluster {
            return self.join(other);
        }
        let mine = Arc::make_mut(self.foreign.get_or_insert_with(Arc::default));
        join_cluster(mine, cluster, other);
        if let Some(theirs) = &other.foreign {
            for (&third, clock) in theirs.iter() {
                if third == me {
                    max_into(&mut self.hb, &clock.hb);
                    max_into(&mut self.px, &clock.px);
                } else {
                    join_cluster(Arc::make_mut(self.foreign.get_or_insert_with(Arc::default)), third, clock);
                }
            }
        }
    }

    /// Whether step `clock` of `actor` of `cluster` happened before. `me` is the cluster of this clock.
    #[inline]
    pub fn knows(&self, me: u32, cluster: u32, actor: u16, clock: u32) -> bool {
        if cluster == me {
            return self.hb[usize::from(actor)] >= clock;
        }
        let theirs = self.foreign.as_ref().and_then(|f| f.get(&cluster));
        theirs.is_some_and(|c| c.hb.get(usize::from(actor)).is_some_and(|&v| v >= clock))
    }

    /// Whether a proxy fence covers step `clock` of `actor`.
    #[inline]
    pub fn fenced(&self, me: u32, cluster: u32, actor: u16, clock: u32) -> bool {
        if cluster == me {
            return self.px.get(usize::from(actor)).is_none_or(|&v| v >= clock);
        }
        let theirs = self.foreign.as_ref().and_then(|f| f.get(&cluster));
        theirs.is_some_and(|c| c.px.get(usize::from(actor)).is_none_or(|&v| v >= clock))
    }

    /// A proxy fence: all that is known to have happened is covered from now on.
    pub fn fence_proxy(&mut self) {
        max_into(&mut self.px, &self.hb);
        if let Some(foreign) = &mut self.foreign {
            for clock in Arc::make_mut(foreign).values_mut() {
                let clock = Arc::make_mut(clock);
                max_into(&mut clock.px, &clock.hb);
            }
        }
    }
}

fn join_cluster(map: &mut BTreeMap<u32, Arc<Clock>>, cluster: u32, clock: &Arc<Clock>) {
    map.entry(cluster)
        .and_modify(|have| {
            if !Arc::ptr_eq(have, clock) {
                let have = Arc::make_mut(have);
                max_into(&mut have.hb, &clock.hb);
                max_into(&mut have.px, &clock.px);
            }
        })
        .or_insert_with(|| Arc::clone(clock));
}

/// The clock of a synchronisation object inside one cluster: it collects what its releasers know.
#[derive(Clone, Debug, Default)]
pub(crate) struct SyncClock {
    pub clock: Option<Arc<Clock>>,
    /// The last base joined: threads that left one barrier together share theirs, so the next join is free.
    last: Option<Arc<Clock>>,
}

impl SyncClock {
    pub fn join(&mut self, from: &Arc<Clock>) {
        if self.last.as_ref().is_some_and(|l| Arc::ptr_eq(l, from)) {
            return;
        }
        match &mut self.clock {
            None => self.clock = Some(Arc::clone(from)),
            Some(have) => Arc::make_mut(have).join(from),
        }
        self.last = Some(Arc::clone(from));
    }

    /// Sets one actor's entry.
    pub fn set(&mut self, actor: usize, clock: u32, fenced: u32) {
        if let Some(have) = &mut self.clock {
            let have = Arc::make_mut(have);
            have.hb[actor] = have.hb[actor].max(clock);
            if let Some(px) = have.px.get_mut(actor) {
                *px = (*px).max(fenced);
            }
        }
    }

    pub fn take(&mut self) -> Option<Arc<Clock>> {
        self.last = None;
        self.clock.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_clocks_have_in_common() {
        let clock = |hb: [u32; 2], foreign: &[(u32, [u32; 2])]| {
            let theirs = |hb: [u32; 2]| Arc::new(Clock { hb: hb.to_vec(), px: hb.to_vec(), foreign: None });
            let foreign = foreign.iter().map(|&(cluster, hb)| (cluster, theirs(hb))).collect();
            Clock { hb: hb.to_vec(), px: hb.to_vec(), foreign: Some(Arc::new(foreign)) }
        };
        let mut common = clock([5, 1], &[(1, [4, 4]), (2, [9, 9])]);
        common.keep_common(&clock([3, 2], &[(2, [7, 10]), (3, [1, 1])]));
        assert_eq!((common.hb.as_slice(), common.px.as_slice()), ([3, 1].as_slice(), [3, 1].as_slice()));
        let foreign = common.foreign.as_ref().unwrap();
        assert_eq!(foreign.keys().collect::<Vec<_>>(), [&2]);
        assert_eq!((foreign[&2].hb.as_slice(), foreign[&2].px.as_slice()), ([7, 9].as_slice(), [7, 9].as_slice()));
        common.keep_common(&Clock::new(2, true));
        assert_eq!((common.hb.as_slice(), common.foreign.is_none()), ([0, 0].as_slice(), true));
    }
}
