//! Every PTX instruction the emulator knows, and the kernels it is judged by, launched through the crate's own driver trait: on the
//! emulator always, on the GPU where there is a Hopper.
//!
//! The cases are the emulator's (`tests/emulator/tests/cases`): images, parameters and expected values worked out from the PTX ISA, as plain
//! data. Here nothing of the emulator stands between them and a device, so on a GPU they compare the emulator's meaning of each
//! instruction with the hardware's. A few expectations say more than the ISA does: `Case::beyond_isa` names why, and a disagreement quotes it.
//!
//! One test per family, so that `cargo test --test instructions wgmma` runs one of them in a process of its own: a case that faults on a
//! GPU takes the context with it, and every later launch of the process fails. The message names the case.

#[path = "emulator/tests/cases/mod.rs"]
mod cases;
#[path = "emulator/tests/planted_bugs/workloads.rs"]
mod workloads;

use std::ffi::CString;

use cases::families::{self, Family};
use cases::{Arg, Case, Element, Swizzle};
use dropless::device::driver::hardware::Hardware;
use dropless::device::driver::{Driver, DriverError, DriverResult, Handle, Launch, TensorMapDesc};
use dropless_kit::device;
use dropless_kit::emulated::{Emulated, Options};
use dropless_kit::goldens::root;

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
        unsafe { driver.launch(stream, &Launch { function, grid, block, cluster, shared_bytes, params: &params, offsets })? };
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

    /// Launches cases of one image in turn; what disagrees is appended. An error is the driver's, and the case it came from.
    fn run(&mut self, ptx: &str, cases: &[Case], wrong: &mut Vec<String>) -> Result<(), (String, DriverError)> {
        self.load(ptx).map_err(|error| ("loading the image".to_owned(), error))?;
        for case in cases {
            let at = |error| (case.name.clone(), error);
            // A module's variables keep what an earlier launch of the entry left in them.
            if ptx.contains("\n.global") && self.launched.contains(&case.entry) {
                self.load(ptx).map_err(at)?;
            }
            self.launched.push(case.entry.clone());
            let outputs = self.launch(case).map_err(at)?;
            let differ = outputs.iter().enumerate().filter_map(|(i, got)| Some((i, case.verdict(i, got)?)));
            wrong.extend(differ.map(|(i, difference)| {
                let beyond = case.beyond_isa.map_or(String::new(), |why| format!(" (this expectation goes beyond the ISA: {why})"));
                format!("{}: argument {i}: {difference}{beyond}", case.name)
            }));
        }
        Ok(())
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
fn agree(images: impl Fn() -> Images) {
    let emulated = Emulated::new(Options { step_limit: 50_000_000, ..Options::default() });
    on("emulator", &emulated, images(), false);
    assert_eq!(emulated.reports(), [""; 0]);
    if dropless_kit::device::hardware().is_some() {
        let driver = Hardware::shared().expect("the driver that has just made a stream");
        on("GPU", &*driver, images(), true);
    }
}

fn on(device: &str, driver: &dyn Driver, images: Images, poisoned_by_a_fault: bool) {
    let mut launcher = Launcher::new(driver);
    let mut wrong = Vec::new();
    let mut count = 0;
    for (ptx, cases) in images {
        count += cases.len();
        if let Err((case, error)) = launcher.run(&ptx, &cases, &mut wrong) {
            wrong.push(format!("{case}: the driver says {error}"));
            if poisoned_by_a_fault {
                wrong.push("nothing after it was run: its context may be lost, and other tests of this process with it".to_owned());
                break;
            }
        }
    }
    assert!(count > 0, "no cases");
    assert!(wrong.is_empty(), "{} of {count} cases disagree on the {device}:\n{}", wrong.len(), wrong.join("\n"));
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
            agree(|| family(families::$name::family()));
        }
    )*};
}
families!(async_copy, atomic, barrier, cluster, control, convert, float, half, integer, matrix, mbarrier, memory, tensor, warp, wgmma);

/// Instructions that the emulator may refuse, each in an image of its own; its own tests say which it refuses.
#[test]
fn rare() {
    let images = || families::rare::singles().into_iter().map(|(ptx, case)| (ptx, vec![case]));
    let known = |ptx: &str| Emulated::new(Options::default()).load_image(0, &with_nul(ptx)).is_ok();
    let emulated = Emulated::new(Options::default());
    on("emulator", &emulated, images().filter(|(ptx, _)| known(ptx)).collect(), false);
    if dropless_kit::device::hardware().is_some() {
        on("GPU", &*Hardware::shared().expect("the driver that has just made a stream"), images().collect(), true);
    }
}

/// Whole kernels: TMA, clusters, wgmma, named barriers, the math library.
#[test]
fn kernels() {
    agree(|| workloads::all().into_iter().map(|case| (committed(&format!("ptx/{}.ptx", case.image)), vec![case])).collect());
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
    let mut wrong = Vec::new();
    Launcher::new(&emulated).run(&committed("instructions/integer.ptx"), &family.cases, &mut wrong).expect("every case runs");
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert!(wrong[0].starts_with(&format!("{name}: argument 0: element 7 is 0x")), "{}", wrong[0]);
}
