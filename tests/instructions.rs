//! Every PTX instruction the emulator knows, and the kernels it is judged by, launched through the crate's own driver trait: on the
//! emulator always, on the GPU where there is a Hopper.
//!
//! The cases are the emulator's (`tests/emulator/tests/cases`): images, parameters and expected values worked out from the PTX ISA, as plain
//! data. Here nothing of the emulator stands between them and a device, so on a GPU they compare the emulator's meaning of each
//! instruction with the hardware's. A few expectations say more than the ISA does: `Case::beyond_isa` names why, and a disagreement quotes it.
//!
//! One test per family, so that `cargo test --test instructions wgmma` runs one of them in a process of its own: a case that faults on a
//! GPU takes the context with it, and every later launch of the process fails. The message names the case. An error that leaves the
//! context as it was costs its case alone.

#[path = "emulator/tests/cases/mod.rs"]
mod cases;
#[path = "emulator/tests/planted_bugs/workloads.rs"]
mod workloads;

use std::ffi::CString;
use std::io::Write;
use std::sync::Arc;

use cases::families::{self, Family};
use cases::{Arg, Case, Element, Swizzle};
use dropless::device::driver::hardware::Hardware;
use dropless::device::driver::{Driver, DriverError, DriverResult, Handle, Launch, TensorMapDesc};
use dropless_kit::device;
use dropless_kit::emulated::{Emulated, Options};
use dropless_kit::faulty::Faulty;
use dropless_kit::goldens::root;
use dropless_kit::recorder::Recorder;

/// A text as the driver takes it.
fn with_nul(ptx: &str) -> Vec<u8> {
    [ptx.as_bytes(), b"\0"].concat()
}

/// A device, one stream, and the image the next cases are in.
struct Launcher<'d> {
    driver: &'d dyn Driver,
    stream: Handle,
    image: Handle,
    /// Entries launched since the image was loaded.
    launched: Vec<String>,
}

impl Launcher<'_> {
    fn new(driver: &dyn Driver) -> Launcher<'_> {
        let stream = driver.create_stream(0).expect("a stream");
        Launcher { driver, stream, image: 0, launched: Vec::new() }
    }

    fn load(&mut self, ptx: &str) -> DriverResult<()> {
        self.image = self.driver.load_image(0, &with_nul(ptx)).map_err(|refused| refused.error)?;
        self.launched.clear();
        Ok(())
    }

    /// Launches a case and gives what its buffers hold afterwards, by argument (nothing for other arguments).
    fn launch(&mut self, case: &Case) -> DriverResult<Vec<Vec<u8>>> {
        let (driver, stream) = (self.driver, self.stream);
        let function = driver.function(self.image, &CString::new(case.entry.as_str()).expect("a name"))?;
        driver.set_shared_limit(function, case.shared_bytes)?;
        let mut addresses = vec![0; case.args.len()];
        for (address, arg) in addresses.iter_mut().zip(&case.args) {
            if let Arg::Buffer { before, .. } = arg {
                *address = driver.alloc(stream, before.len())?;
                device::write(driver, stream, *address, before)?;
            }
        }
        let (offsets, size) = cases::layout(case);
        let mut params = vec![0; size];
        for (i, arg) in case.args[..case.params].iter().enumerate() {
            let bytes = match arg {
                Arg::U8(value) => vec![*value],
                Arg::U16(value) => value.to_le_bytes().to_vec(),
                Arg::U32(value) => value.to_le_bytes().to_vec(),
                Arg::U64(value) => value.to_le_bytes().to_vec(),
                Arg::Buffer { .. } => addresses[i].to_le_bytes().to_vec(),
                Arg::Map(map) => {
                    let words = driver.encode_tensor_map(0, &description(map, addresses[map.of]))?.0;
                    words.iter().flat_map(|word| word.to_le_bytes()).collect()
                }
            };
            params[offsets[i]..offsets[i] + bytes.len()].copy_from_slice(&bytes);
        }
        let Case { grid, block, cluster, shared_bytes, .. } = *case;
        let offsets = if case.one_struct { &[0] } else { &offsets[..] };
        // SAFETY: the parameters are laid out as the case says its kernel declares them; the buffers are as long as the case says.
        unsafe {
            driver.launch(
                stream,
                &Launch { function, grid, block, cluster, shared_bytes, is_programmatic: false, params: &params, offsets },
            )?
        };
        driver.synchronize(stream)?;
        let mut outputs = vec![Vec::new(); case.args.len()];
        for (i, arg) in case.args.iter().enumerate() {
            if let Arg::Buffer { before, .. } = arg {
                outputs[i] = vec![0; before.len()];
                // SAFETY: a mutable slice is writable for its length.
                unsafe { driver.copy_to_host(stream, outputs[i].as_mut_ptr(), addresses[i], before.len())? };
                driver.free(stream, addresses[i])?;
            }
        }
        Ok(outputs)
    }

    /// Launches cases of one image in turn and counts what came of each. An error of the driver costs the case it came from: the next
    /// ones are launched on another stream, as long as the context still makes one.
    fn run(&mut self, ptx: &str, cases: &[Case], tally: &mut Tally) {
        if let Err(error) = self.load(ptx) {
            tally.refused += cases.len();
            tally.wrong.push(format!("loading the image of {}: {error}", cases[0].name));
            tally.lost = !self.goes_on();
            return;
        }
        for case in cases {
            if tally.lost {
                tally.not_run += 1;
                continue;
            }
            // A module's variables keep what an earlier launch of the entry left in them.
            let again = ptx.contains("\n.global") && self.launched.contains(&case.entry);
            let loaded = if again { self.load(ptx) } else { Ok(()) };
            self.launched.push(case.entry.clone());
            match loaded.and_then(|()| self.launch(case)) {
                Ok(outputs) => tally.compare(case, &outputs),
                Err(error) => {
                    tally.refused += 1;
                    tally.wrong.push(format!("{}: {error}", case.name));
                    tally.lost = !self.goes_on();
                }
            }
        }
    }

    /// Whether the context still works: a new stream takes the place of the old one, behind which work may have failed.
    fn goes_on(&mut self) -> bool {
        let stream = self.driver.create_stream(0).and_then(|stream| self.driver.synchronize(stream).map(|()| stream));
        if let Ok(stream) = stream {
            self.stream = stream;
        }
        stream.is_ok()
    }
}

/// What came of a family's cases, and everything that is wrong.
#[derive(Default)]
struct Tally {
    agree: usize,
    disagree: usize,
    refused: usize,
    not_run: usize,
    lost: bool,
    wrong: Vec<String>,
}

impl Tally {
    /// Counts the cases of these images on a device.
    fn of(driver: &dyn Driver, images: &Images) -> Tally {
        let (mut launcher, mut tally) = (Launcher::new(driver), Tally::default());
        for (ptx, cases) in images {
            if tally.lost {
                tally.not_run += cases.len();
            } else {
                launcher.run(ptx, cases, &mut tally);
            }
        }
        tally
    }

    fn compare(&mut self, case: &Case, outputs: &[Vec<u8>]) {
        let before = self.wrong.len();
        for (i, got) in outputs.iter().enumerate() {
            if let Some(difference) = case.verdict(i, got) {
                let beyond = case.beyond_isa.map_or(String::new(), |why| format!(" (this expectation goes beyond the ISA: {why})"));
                self.wrong.push(format!("{}: argument {i}: {difference}{beyond}", case.name));
            }
        }
        *if self.wrong.len() == before { &mut self.agree } else { &mut self.disagree } += 1;
    }

    fn summary(&self) -> String {
        let Tally { agree, disagree, refused, not_run, .. } = self;
        let of = agree + disagree + refused + not_run;
        let lost = if self.lost { "; the context is lost, and with it other tests of this process" } else { "" };
        format!("{agree} of {of} cases agree, {disagree} disagree, {refused} refused by the driver, {not_run} not run{lost}")
    }

    #[track_caller]
    fn check(&self, family: &str, device: &str) {
        assert!(self.agree + self.wrong.len() > 0, "no cases");
        assert!(self.wrong.is_empty(), "{family} on the {device}: {}:\n{}", self.summary(), self.wrong.join("\n"));
    }
}

/// The driver's arguments for a case's tensor map.
fn description(map: &cases::TensorMap, address: u64) -> TensorMapDesc {
    fn padded<T: Copy, const N: usize>(values: &[T], rest: T) -> [T; N] {
        std::array::from_fn(|i| values.get(i).copied().unwrap_or(rest))
    }
    TensorMapDesc {
        address,
        data_type: match map.element {
            Element::U8 => 0,
            Element::U16 => 1,
            Element::U32 => 2,
            Element::F16 => 6,
            Element::F32 => 7,
            Element::Bf16 => 9,
        },
        rank: map.dims.len() as u32,
        dims: padded(&map.dims, 1),
        strides_bytes: padded(&map.strides, 0),
        tile: padded(&map.tile, 1),
        swizzle: match map.swizzle {
            Swizzle::None => 0,
            Swizzle::B32 => 1,
            Swizzle::B64 => 2,
            Swizzle::B128 => 3,
        },
        l2_promotion: 0,
    }
}

/// Images and the cases they hold.
type Images = Vec<(String, Vec<Case>)>;

/// Runs them on every device there is, and fails with all disagreements at once.
fn agree(family: &str, images: impl Fn() -> Images) {
    if !device::hardware_only() {
        let emulated = Emulated::new(Options { step_limit: 50_000_000, ..Options::default() });
        Tally::of(&emulated, &images()).check(family, "emulator");
        assert_eq!(emulated.reports(), [""; 0]);
    }
    agree_on_hardware(family, images);
}

fn agree_on_hardware(family: &str, images: impl Fn() -> Images) {
    if device::hardware().is_some() {
        let driver = Hardware::shared().expect("the driver that has just made a stream");
        let tally = Tally::of(&*driver, &images());
        // Past the capture of the test harness, which shows nothing of a test that passes.
        let _ = writeln!(std::io::stderr(), "{family} on the GPU: {}", tally.summary());
        tally.check(family, "GPU");
    }
}

fn committed(path: &str) -> String {
    let path = root().join("tests/emulator/kernels").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn family(family: Family) -> Images {
    vec![(committed(&format!("instructions/{}.ptx", family.name)), family.cases)]
}

macro_rules! families {
    ($($name:ident),* $(,)?) => {$(
        #[test]
        fn $name() {
            agree(stringify!($name), || family(families::$name::family()));
        }
    )*};
}
families!(async_copy, atomic, barrier, cluster, control, convert, float, half, integer, matrix, mbarrier, memory, tensor, warp, wgmma);

/// Instructions that the emulator may refuse, each in an image of its own; its own tests say which it refuses.
#[test]
fn rare() {
    let images = || families::rare::singles().into_iter().map(|(ptx, case)| (ptx, vec![case]));
    if !device::hardware_only() {
        let known = |ptx: &str| Emulated::new(Options::default()).load_image(0, &with_nul(ptx)).is_ok();
        let known = images().filter(|(ptx, _)| known(ptx)).collect();
        Tally::of(&Emulated::new(Options::default()), &known).check("rare", "emulator");
    }
    agree_on_hardware("rare", || images().collect());
}

/// Whole kernels: TMA, clusters, wgmma, named barriers, the math library.
#[test]
fn kernels() {
    agree("kernels", || workloads::all().into_iter().map(|case| (committed(&format!("ptx/{}.ptx", case.image)), vec![case])).collect());
}

/// A wrong expectation is found, whatever the device.
#[test]
fn a_planted_disagreement_is_reported() {
    let emulated = Emulated::new(Options::default());
    let mut family = families::integer::family();
    let case = &mut family.cases[0];
    let Arg::Buffer { after: cases::Expect::Values(_, wants), .. } = &mut case.args[0] else { panic!("argument 0 is the output") };
    let cases::Want::Bits(bits) = &mut wants[7] else { panic!("integers are bits") };
    *bits ^= 1;
    let name = case.name.clone();
    let mut tally = Tally::default();
    Launcher::new(&emulated).run(&committed("instructions/integer.ptx"), &family.cases, &mut tally);
    assert_eq!((tally.disagree, tally.refused, tally.wrong.len()), (1, 0, 1), "{:?}", tally.wrong);
    assert!(tally.wrong[0].starts_with(&format!("{name}: argument 0: element 7 is 0x")), "{}", tally.wrong[0]);
}

/// A call that the driver refuses costs one case, whichever call it is.
#[test]
fn a_refused_call_costs_one_case() {
    let images = family(families::integer::family());
    let cases = images[0].1.len();
    let mut refused = std::collections::BTreeMap::new();
    for nth in 2..20 {
        let driver = Faulty::new(Arc::new(Emulated::new(Options::default())), nth, DriverError::new(1));
        let tally = Tally::of(&driver, &images);
        refused.insert(driver.failed().expect("a call that failed"), tally.wrong.clone());
        assert_eq!((tally.agree, tally.refused, tally.wrong.len()), (cases - 1, 1, 1), "call {nth}: {:?}", tally.wrong);
        assert_eq!(tally.summary(), format!("{} of {cases} cases agree, 0 disagree, 1 refused by the driver, 0 not run", cases - 1));
    }
    assert!(refused.contains_key("launch") && refused.contains_key("synchronize") && refused.contains_key("alloc"), "{refused:?}");
    assert!(refused["launch"][0].starts_with(&images[0].1[0].name), "{refused:?}");
    // An image is refused with all of its cases.
    let driver = Faulty::new(Arc::new(Emulated::new(Options::default())), 1, DriverError::new(218));
    let tally = Tally::of(&driver, &images);
    assert_eq!((driver.failed(), tally.agree, tally.refused, tally.wrong.len()), (Some("load_image"), 0, cases, 1));
}

/// Where the context is lost, nothing more is launched, and the rest is counted as not run.
#[test]
fn a_lost_context_ends_the_run() {
    let images = [families::integer::family(), families::half::family()].map(family).into_iter().flatten().collect::<Images>();
    let cases: usize = images.iter().map(|(_, cases)| cases.len()).sum();
    let recorder = Recorder::default();
    recorder.refuse_events(true); // and with them every wait
    let tally = Tally::of(&recorder, &images);
    assert_eq!((tally.refused, tally.not_run, tally.wrong.len()), (1, cases - 1, 1), "{:?}", tally.wrong);
    assert!(tally.summary().ends_with("the context is lost, and with it other tests of this process"));
}
