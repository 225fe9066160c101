//! What a buffer remembers of its uses, by which an operation that would overtake one of them is refused.
//!
//! A use counts from the stream's operation that queued it. A use that was recorded in a graph counts from the graph's last launch
//! instead; before the first launch it has not happened, and what it would write is not there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::Device;
use super::graph::Recording;
use super::stream::{Timeline, lock};
use crate::error::Place;

/// How an operation uses one argument.
#[derive(Clone, Copy)]
pub(crate) struct Access<'a> {
    pub(crate) place: Place,
    /// None for raw views, whose contract leaves the order to the caller.
    pub(crate) mark: Option<&'a Mark>,
    pub(crate) write: bool,
    /// What the kernel that is to use it needs of its alignment, and what there is instead.
    pub(crate) misfit: Option<(&'static str, usize)>,
}

/// A buffer's memory of its uses.
pub(crate) struct Mark {
    uses: Mutex<Vec<Use>>,
    driver_id: usize,
}

/// Why a use may not follow another.
#[derive(Debug, PartialEq)]
pub(super) enum Conflict {
    /// The other was on this stream, which has not been joined.
    NotJoined(u64),
    /// What is to be read is written by a graph that was not launched.
    NotRun,
}

/// The last read or the last write on one stream, or in one graph.
struct Use {
    stream: u64,
    /// To wait for.
    #[cfg(feature = "cuda")]
    timeline: std::sync::Weak<Timeline>,
    /// The same, of a stream that an engine lends: nobody waits for its work when it is given back, so that
    /// it has to be at hand as long as the use matters.
    _kept: Option<Arc<Timeline>>,
    /// Of the stream: then its work is done.
    ended: Arc<AtomicBool>,
    when: When,
    write: bool,
}

enum When {
    /// The stream's operation of this number.
    Operation(u64),
    /// The last launch of a graph. `settled` is the launch that a later write was ordered behind (0: there was none then): that
    /// launch orders nothing any more, and a graph that was not launched hides nothing any more.
    Launch { recording: Arc<Recording>, settled: Option<u64> },
}

impl Use {
    /// The operation that this use counts from; `None` where it orders nothing.
    fn operation(&self) -> Option<u64> {
        match &self.when {
            When::Operation(operation) => Some(*operation),
            When::Launch { recording, settled } => Some(recording.launched()).filter(|launch| *launch > 0 && Some(*launch) != *settled),
        }
    }

    /// True where it would write what is not there yet.
    fn is_pending_write(&self) -> bool {
        self.write && matches!(&self.when, When::Launch { recording, settled: None } if recording.launched() == 0)
    }

    fn is_of(&self, graph: Option<&Arc<Recording>>) -> bool {
        matches!((&self.when, graph), (When::Launch { recording, .. }, Some(graph)) if Arc::ptr_eq(recording, graph))
    }

    /// False once it can refuse nothing any more: its stream has ended, or it was a read in a graph that is gone and never ran.
    fn matters(&self) -> bool {
        let gone = match &self.when {
            When::Operation(_) => false,
            When::Launch { recording, .. } => recording.is_given_up() && self.operation().is_none() && !self.is_pending_write(),
        };
        !gone && (self.is_pending_write() || !self.ended.load(Ordering::Acquire))
    }
}

/// Drops uses that can refuse nothing any more. The launch of a graph that is gone is an operation like others, of which the last
/// read and the last write on each stream are enough.
fn forget(uses: &mut Vec<Use>) {
    uses.retain(Use::matters);
    for i in (0..uses.len()).rev() {
        let (earlier, later) = uses.split_at_mut(i);
        let When::Launch { recording, .. } = &later[0].when else { continue };
        let (true, Some(operation)) = (recording.is_given_up(), later[0].operation()) else { continue };
        later[0].when = When::Operation(operation);
        let Use { stream, write, .. } = later[0];
        let same = |u: &&mut Use| (u.stream, u.write) == (stream, write) && matches!(u.when, When::Operation(_));
        if let Some(Use { when: When::Operation(last), .. }) = earlier.iter_mut().find(same) {
            *last = operation.max(*last);
            uses.remove(i);
        }
    }
}

impl Mark {
    /// Of a buffer on this device.
    pub(crate) fn of(device: &Device) -> Mark {
        Mark { uses: Mutex::default(), driver_id: device.driver_id() }
    }

    pub(super) fn driver_id(&self) -> usize {
        self.driver_id
    }

    /// Why a new use on `timeline`, perhaps recorded in `graph`, may not follow the earlier ones.
    pub(super) fn conflict(&self, timeline: &Timeline, graph: Option<&Arc<Recording>>, write: bool) -> Option<Conflict> {
        lock(&self.uses).iter().find_map(|u| {
            if !(write || u.write) || u.is_of(graph) {
                return None; // two reads, or in the order of one graph
            }
            if u.is_pending_write() {
                return (!write).then_some(Conflict::NotRun);
            }
            let unseen = u.operation().is_some_and(|operation| !timeline.has_seen(u.stream, operation));
            (unseen && !u.ended.load(Ordering::Acquire)).then_some(Conflict::NotJoined(u.stream))
        })
    }

    /// Remembers a use that had no conflict.
    pub(super) fn record(&self, timeline: &Arc<Timeline>, graph: Option<&Arc<Recording>>, operation: u64, write: bool) {
        let mut uses = lock(&self.uses);
        if write && graph.is_none() {
            // Everything earlier is ordered before this write; a graph may be launched again.
            uses.retain_mut(|u| match &mut u.when {
                When::Operation(_) => false,
                When::Launch { recording, settled } => {
                    *settled = Some(recording.launched());
                    !recording.is_given_up()
                }
            });
        }
        if write && graph.is_some() {
            // What other graphs were to write and have not is written anew by this one: its own launch is what counts.
            for u in uses.iter_mut().filter(|u| u.is_pending_write() && !u.is_of(graph)) {
                if let When::Launch { settled, .. } = &mut u.when {
                    *settled = Some(0);
                }
            }
        }
        forget(&mut uses);
        let same = |u: &&mut Use| {
            let of_same = match graph {
                Some(_) => u.is_of(graph),
                None => u.stream == timeline.id && matches!(u.when, When::Operation(_)),
            };
            of_same && u.write == write
        };
        let when = match graph {
            Some(graph) => When::Launch { recording: graph.clone(), settled: None },
            None => When::Operation(operation),
        };
        match uses.iter_mut().find(same) {
            Some(u) => u.when = when,
            None => {
                let _kept = timeline.is_lent().then(|| timeline.clone());
                uses.push(Use {
                    stream: timeline.id,
                    #[cfg(feature = "cuda")]
                    timeline: Arc::downgrade(timeline),
                    _kept,
                    ended: timeline.ended().clone(),
                    when,
                    write,
                });
            }
        }
    }

    /// Makes `home` wait for every use elsewhere, so that freeing on `home` comes last. False if neither it nor the host could
    /// wait: then the memory may be in use.
    #[cfg(feature = "cuda")]
    pub(super) fn settle(&self, home: &Timeline) -> bool {
        lock(&self.uses).iter().all(|u| {
            let seen = u.operation().is_none_or(|operation| home.has_seen(u.stream, operation));
            if seen || u.ended.load(Ordering::Acquire) {
                return true;
            }
            let Some(other) = u.timeline.upgrade() else { return false }; // gone, and could not be waited for
            let (Some(home), Some(other)) = (&home.cuda, &other.cuda) else { return true };
            // An event may be refused for want of memory, which loses no device. The host waits for no stream
            // that is lent.
            home.wait_for(other).is_ok() || !other.is_lent() && other.synchronize().is_ok()
        })
    }
}

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;
    use crate::device::Stream;

    /// A stream without a driver behind it.
    fn stream() -> Stream {
        Stream::new(&Device::cpu()).unwrap()
    }

    fn uses(mark: &Mark) -> usize {
        lock(&mark.uses).len()
    }

    /// Whoever comes and goes leaves nothing behind but the order that is still needed.
    #[test]
    fn marks_do_not_grow() {
        let (mark, stream_of_home) = (Mark::of(&Device::cpu()), stream());
        let home = &stream_of_home.timeline;
        mark.record(home, None, home.next_operation(), true);
        for _ in 0..100 {
            let other = stream();
            mark.record(&other.timeline, None, other.timeline.next_operation(), false);
        }
        for launched in [false, true, true] {
            for _ in 0..100 {
                let graph = Arc::new(Recording::new());
                mark.record(home, Some(&graph), 0, false);
                if launched {
                    graph.launched_by(home.next_operation());
                }
                graph.give_up();
            }
        }
        mark.record(home, None, home.next_operation(), false);
        assert_eq!(uses(&mark), 2, "the write and the last read");
        assert_eq!(mark.conflict(&stream().timeline, None, true), Some(Conflict::NotJoined(home.id)));
        mark.record(home, None, home.next_operation(), true);
        assert_eq!(uses(&mark), 1);
    }

    /// Captures that never ran leave what the last of them was to write.
    #[test]
    fn captures_that_never_ran_leave_one() {
        let (mark, stream_of_home) = (Mark::of(&Device::cpu()), stream());
        for _ in 0..100 {
            let graph = Arc::new(Recording::new());
            mark.record(&stream_of_home.timeline, Some(&graph), 0, true);
            graph.give_up();
        }
        assert!(uses(&mark) <= 2, "{}", uses(&mark));
    }

    /// The last launch of a graph that is gone is kept.
    #[test]
    fn the_last_launch_is_an_operation() {
        let (mark, stream_of_home) = (Mark::of(&Device::cpu()), stream());
        let home = &stream_of_home.timeline;
        let graph = Arc::new(Recording::new());
        mark.record(home, Some(&graph), 0, true);
        assert_eq!(mark.conflict(home, None, false), Some(Conflict::NotRun));
        graph.launched_by(home.next_operation());
        graph.give_up();
        mark.record(home, None, home.next_operation(), false);
        assert_eq!((uses(&mark), mark.conflict(home, None, false)), (2, None));
        assert_eq!(mark.conflict(&stream().timeline, None, false), Some(Conflict::NotJoined(home.id)));
    }
}
