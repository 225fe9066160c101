//! Every device a test runs on.

use std::cell::Cell;
use std::io::Write;
use std::sync::{Arc, OnceLock};

use dropless::device::driver::{Driver, DriverResult, Handle};
use dropless::{Device, Element, Error, Stream};

use crate::emulated::{Emulated, Options, Schedule, TmaCompletion};

thread_local! {
    static EMULATING: Cell<bool> = const { Cell::new(false) };
    /// One device per thread, so that a test loads each image once.
    static EMULATED: (Arc<Emulated>, Stream) = emulated();
}

/// Whether a test on this thread runs on the emulated GPU now.
pub fn is_emulating() -> bool {
    EMULATING.get()
}

/// Calls `test` once per device: the CPU with one thread and with three, the emulated GPU in every schedule, the GPU where there is
/// one. `DROPLESS_REQUIRE_GPU=1` turns a missing GPU into a failure; `DROPLESS_HARDWARE_ONLY=1` does, too, and leaves out all the others.
pub fn each_device(test: impl Fn(&Stream)) {
    if Chosen::get().cpu {
        [1, 3].map(cpu).iter().for_each(&test);
    }
    each_gpu(test);
}

/// Calls `test` on the emulated GPU in every schedule, and on the GPU where there is one. `DROPLESS_CPU_ONLY=1` leaves both out, for
/// what changes nothing on them.
pub fn each_gpu(test: impl Fn(&Stream)) {
    if Chosen::get().hardware.is_none() {
        return;
    }
    each_schedule(&test);
    if let Some(stream) = hardware() {
        test(&stream);
    }
}

/// Calls `test` on the CPU and, for one seed in 32, on the emulated GPU in the random schedule of that seed (or in the one of
/// `DROPLESS_SCHEDULE`) and on the GPU where there is one: for properties, of which many cases are tried.
pub fn some_device(seed: u64, test: impl Fn(&Stream)) {
    let chosen = Chosen::get();
    if chosen.cpu {
        test(&cpu(2));
    }
    if !seed.is_multiple_of(32) || chosen.hardware.is_none() {
        return;
    }
    if chosen.emulated {
        let order = asked_for().unwrap_or((Schedule::Random(seed), TmaCompletion::Random));
        emulating(|| EMULATED.with(|(driver, stream)| in_schedule(driver, stream, order, &test)));
    }
    if let Some(stream) = hardware() {
        test(&stream);
    }
}

/// Calls `test` on the emulated GPU: in order and in reverse, each with bulk copies that complete early and late, then in random
/// schedules with random completion. Where no kernel copies in bulk, completion is nothing to vary.
///
/// What fails says how to run it again alone: `DROPLESS_SCHEDULE=random:7,random`, that is `in_order`, `reverse` or `random:SEED`,
/// then how bulk copies complete, `eager`, `lazy` or `random`. `DROPLESS_SEEDS=N` tries N random schedules instead of one.
pub fn each_schedule(test: impl Fn(&Stream)) {
    if hardware_only() {
        return;
    }
    let schedules = asked_for().map_or_else(all, |order| vec![order]);
    emulating(|| {
        EMULATED.with(|(driver, stream)| {
            let mut bulk = true;
            for (schedule, tma) in schedules {
                if tma == TmaCompletion::Lazy && !bulk {
                    continue; // as it was with early completion
                }
                let before = driver.bulk_bytes();
                in_schedule(driver, stream, (schedule, tma), &test);
                bulk = driver.bulk_bytes() > before;
            }
        });
    });
}

/// True with `DROPLESS_HARDWARE_ONLY=1`: a test that is about the CPU or the emulator has nothing to do.
pub fn hardware_only() -> bool {
    !Chosen::get().emulated && Chosen::get().hardware.is_some()
}

/// Which devices run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Chosen {
    cpu: bool,
    emulated: bool,
    /// None: left out. Otherwise whether its absence is a failure.
    hardware: Option<bool>,
}

impl Chosen {
    fn get() -> Chosen {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| value == "1");
        Chosen::by(set).unwrap_or_else(|refused| panic!("{refused}"))
    }

    /// By which variables are 1.
    fn by(set: impl Fn(&str) -> bool) -> Result<Chosen, &'static str> {
        match (set("DROPLESS_CPU_ONLY"), set("DROPLESS_HARDWARE_ONLY")) {
            (true, true) => Err("DROPLESS_CPU_ONLY=1 and DROPLESS_HARDWARE_ONLY=1 leave no device to run on"),
            (true, false) => Ok(Chosen { cpu: true, emulated: false, hardware: None }),
            (false, true) => Ok(Chosen { cpu: false, emulated: false, hardware: Some(true) }),
            (false, false) => Ok(Chosen { cpu: true, emulated: true, hardware: Some(set("DROPLESS_REQUIRE_GPU")) }),
        }
    }
}

type Order = (Schedule, TmaCompletion);

/// The schedule of `DROPLESS_SCHEDULE`.
fn asked_for() -> Option<Order> {
    let text = std::env::var("DROPLESS_SCHEDULE").ok()?;
    Some(parse(&text).unwrap_or_else(|| panic!("DROPLESS_SCHEDULE={text}: write it as in `random:7,lazy`")))
}

/// The fixed schedules, and as many random ones as `DROPLESS_SEEDS` says.
fn all() -> Vec<Order> {
    let seeds = std::env::var("DROPLESS_SEEDS").ok();
    let seeds = seeds.map_or(1, |text| text.parse().unwrap_or_else(|_| panic!("DROPLESS_SEEDS={text}: not a number")));
    Options::standard(seeds).into_iter().map(|options| (options.schedule, options.tma)).collect()
}

fn parse(text: &str) -> Option<Order> {
    let (schedule, tma) = text.split_once(',')?;
    let schedule = match schedule.split_once(':') {
        None if schedule == "in_order" => Schedule::InOrder,
        None if schedule == "reverse" => Schedule::Reverse,
        Some(("random", seed)) => Schedule::Random(seed.parse().ok()?),
        _ => return None,
    };
    let tma = match tma {
        "eager" => TmaCompletion::Eager,
        "lazy" => TmaCompletion::Lazy,
        "random" => TmaCompletion::Random,
        _ => return None,
    };
    Some((schedule, tma))
}

/// As `parse` reads it.
fn text((schedule, tma): Order) -> String {
    let schedule = match schedule {
        Schedule::InOrder => "in_order".to_owned(),
        Schedule::Reverse => "reverse".to_owned(),
        Schedule::Random(seed) => format!("random:{seed}"),
    };
    let tma = match tma {
        TmaCompletion::Eager => "eager",
        TmaCompletion::Lazy => "lazy",
        TmaCompletion::Random => "random",
    };
    format!("{schedule},{tma}")
}

/// Calls `test` in one schedule, and says which it was if that fails.
fn in_schedule(driver: &Emulated, stream: &Stream, order: Order, test: &impl Fn(&Stream)) {
    struct Failing(Order);
    impl Drop for Failing {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("failed on the emulated GPU; again in this schedule alone: DROPLESS_SCHEDULE={}", text(self.0));
            }
        }
    }
    let _failing = Failing(order);
    let (schedule, tma) = order;
    driver.set_options(Options { schedule, tma, ..Options::default() });
    test(stream);
    assert_eq!(driver.reports(), [""; 0]);
}

/// Lets [`affords`] know that the emulator runs what `run` does.
fn emulating(run: impl FnOnce()) {
    struct Emulating;
    impl Drop for Emulating {
        fn drop(&mut self) {
            EMULATING.set(false);
        }
    }
    EMULATING.set(true);
    let _until_the_end = Emulating;
    run();
}

/// Copies bytes to device memory by a driver's own calls, and waits.
///
/// # Errors
///
/// The driver's.
pub fn write(driver: &dyn Driver, stream: Handle, address: u64, bytes: &[u8]) -> DriverResult<()> {
    let pinned = driver.alloc_pinned(0, bytes.len().max(1))?;
    // SAFETY: as much memory as bytes, which nobody else knows of.
    unsafe { pinned.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    // SAFETY: initialised above, and freed only when the copy has happened.
    unsafe { driver.copy_to_device(stream, address, pinned, bytes.len()) }?;
    driver.synchronize(stream)?;
    // SAFETY: as above.
    unsafe { driver.free_pinned(pinned) }
}

/// False where the emulator would be too slow: with every detector on it takes some million inner steps per second.
/// Everything else affords everything.
pub fn affords(operations: usize) -> bool {
    !EMULATING.get() || operations <= 50_000
}

/// True where the device runs kernels for these types side by side: the CPU mixes types, a GPU does not.
pub fn mixes<A: Element, W: Element>(stream: &Stream) -> bool {
    A::DTYPE == W::DTYPE || stream.place() == dropless::Place::Host
}

/// A stream on the CPU with that many threads.
pub fn cpu(threads: usize) -> Stream {
    Device::cpu_with_threads(threads).and_then(|device| device.stream()).expect("a CPU stream")
}

/// A stream on an emulated GPU, and its driver.
pub fn emulated() -> (Arc<Emulated>, Stream) {
    let driver = Arc::new(Emulated::new(Options::default()));
    let stream = Device::with_driver(driver.clone(), 0).and_then(|device| device.stream()).expect("an emulated stream");
    (driver, stream)
}

/// A stream on the GPU of this machine. Without one: a panic if `DROPLESS_REQUIRE_GPU` or `DROPLESS_HARDWARE_ONLY` is 1, else a line on
/// the terminal.
///
/// All streams of a process share one device, so that each image is loaded once.
///
/// # Panics
///
/// As said, and if the device is there and makes no stream.
pub fn hardware() -> Option<Stream> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| found(Device::cuda(0), Chosen::get().hardware == Some(true)));
    device.as_ref().map(|device| device.stream().expect("a stream of the GPU"))
}

/// The device, or a line past the capture of the test harness, which shows nothing of a test that passes.
fn found(device: Result<Device, Error>, required: bool) -> Option<Device> {
    match device {
        Ok(device) => Some(device),
        Err(error) if required => panic!("a GPU is required (DROPLESS_REQUIRE_GPU, DROPLESS_HARDWARE_ONLY), but: {error}"),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "NOT RUN ON HARDWARE, emulated only: {error}");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_asked_for() {
        for order in Options::standard(3).into_iter().map(|options| (options.schedule, options.tma)) {
            assert_eq!(parse(&text(order)), Some(order));
        }
        assert_eq!(text((Schedule::Random(u64::MAX), TmaCompletion::Lazy)), "random:18446744073709551615,lazy");
        assert_eq!(["", "random", "random:x,lazy", "in_order", "random:1,", "reverse:1,lazy"].map(parse), [None; 6]);
    }

    /// The variables choose: all of it, the CPU alone, the GPU alone, which then must be there.
    #[test]
    fn variables_choose_devices() {
        let by = |names: &[&str]| Chosen::by(|name| names.contains(&name));
        let all = Chosen { cpu: true, emulated: true, hardware: Some(false) };
        assert_eq!(by(&[]), Ok(all));
        assert_eq!(by(&["DROPLESS_REQUIRE_GPU"]), Ok(Chosen { hardware: Some(true), ..all }));
        let cpu = Chosen { cpu: true, emulated: false, hardware: None };
        assert_eq!(by(&["DROPLESS_CPU_ONLY"]), Ok(cpu));
        assert_eq!(by(&["DROPLESS_CPU_ONLY", "DROPLESS_REQUIRE_GPU"]), Ok(cpu));
        assert_eq!(by(&["DROPLESS_HARDWARE_ONLY"]), Ok(Chosen { cpu: false, emulated: false, hardware: Some(true) }));
        assert!(by(&["DROPLESS_CPU_ONLY", "DROPLESS_HARDWARE_ONLY"]).is_err());
    }

    /// The same in a process of its own, where no device runs but a GPU: nothing is emulated, and its absence is a failure.
    #[test]
    fn hardware_alone() {
        const CHILD: &str = "DROPLESS_TEST_HARDWARE_ALONE";
        if std::env::var_os(CHILD).is_some() {
            let runs = Cell::new(0);
            let count = |_: &Stream| runs.set(runs.get() + 1);
            each_schedule(count);
            some_device(1, count);
            assert_eq!((runs.get(), hardware_only()), (0, true));
            each_device(|stream| {
                assert!(affords(1 << 20));
                count(stream);
            });
            some_device(32, count);
            assert_eq!(runs.get(), 2);
            return;
        }
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["device::tests::hardware_alone", "--exact"]).env(CHILD, "1").env("DROPLESS_HARDWARE_ONLY", "1");
        let output = child.env_remove("DROPLESS_CPU_ONLY").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        match Device::cuda(0) {
            Ok(_) => assert!(output.status.success(), "{text}"),
            Err(error) => assert!(
                !output.status.success()
                    && text.contains(&format!("is required (DROPLESS_REQUIRE_GPU, DROPLESS_HARDWARE_ONLY), but: {error}")),
                "{text}"
            ),
        }
    }

    /// A device that is there serves many streams; one that is not is a panic or nothing.
    #[test]
    fn what_is_found_is_kept() {
        let emulated = || Device::with_driver(Arc::new(Emulated::new(Options::default())), 0);
        assert!(found(emulated(), true).is_some() && found(emulated(), false).is_some());
        assert!(found(Err(Error::NoDriver { searched: &[] }), false).is_none());
        let required = std::panic::catch_unwind(|| found(Err(Error::NoDriver { searched: &[] }), true));
        assert!(required.is_err());
    }

    /// Without bulk copies there are as many runs as orders, each on the emulated GPU.
    #[test]
    fn every_schedule_is_run() {
        if hardware_only() {
            return;
        }
        let runs = Cell::new(0);
        each_schedule(|stream| {
            assert!(!affords(1 << 20) && stream.place() == dropless::Place::Cuda(0));
            runs.set(runs.get() + 1);
        });
        assert!(affords(1 << 20) && runs.get() == asked_for().map_or_else(|| all().len() - 2, |_| 1));
    }
}
