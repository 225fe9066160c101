//! Work on many things at once, on this machine's threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What `work` gives for each thing, in their order.
pub fn in_parallel<T: Sync, R: Send>(things: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(things.len());
    if threads <= 1 {
        return things.iter().map(work).collect();
    }
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let lock = || done.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let run = || {
        while let Some(thing) = {
            let at = next.fetch_add(1, Ordering::Relaxed);
            things.get(at).map(|thing| (at, thing))
        } {
            let result = work(thing.1);
            lock().push((thing.0, result));
        }
    };
    std::thread::scope(|scope| {
        // Where a thread cannot be started, the others do its share.
        let start = |_| std::thread::Builder::new().name("weights".into()).spawn_scoped(scope, run);
        let _started: Vec<_> = (1..threads).map(start).collect();
        run();
    });
    let mut results: Vec<(usize, R)> = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    results.sort_by_key(|(at, _)| *at);
    results.into_iter().map(|(_, result)| result).collect()
}
