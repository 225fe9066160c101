//! How much memory a run needs, how much there is, and how much was used in the end.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use dropless::{Bf16, DType, Error, F16};
use serde_json::{Value, json};

use super::columns::Columns;
use super::config::Config;
use super::failure::{Failure, refuse};
use super::model;
use super::report::bytes_text;
use super::weights::Footprint;

/// What decides the size of everything that is allocated for a run.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Sequences.
    pub batch: usize,
    /// Tokens of one sequence that the cache holds.
    pub context: usize,
    /// Tokens of the longest prompt.
    pub prompt: usize,
    /// Tokens of the longest sequence, those that are generated included.
    pub reached: usize,
    /// Tokens of the largest step.
    pub step_tokens: usize,
    /// Rows of logits that one step may give.
    pub logits_rows: usize,
    /// Bytes of an activation.
    pub activation_bytes: usize,
    /// Products of experts round rows to FP8 where there are many.
    pub fp8_inputs: bool,
}

/// What a run is asked for; its sizes follow from it.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    pub batch: usize,
    pub context: usize,
    /// Tokens of the longest prompt, and of the longest sequence.
    pub prompt: usize,
    pub reached: usize,
    /// Tokens of one prefill step at most.
    pub chunk: usize,
    /// Logits of all tokens of a prompt are kept.
    pub all_logits: bool,
    pub activations: DType,
    pub fp8_inputs: bool,
}

impl Sizes {
    /// Those of a run.
    pub fn of(asked: &Asked) -> Sizes {
        let Asked { batch, context, prompt, reached, chunk, all_logits, activations, fp8_inputs } = *asked;
        let step_tokens = chunk.min(prompt.saturating_mul(batch)).max(batch);
        let logits_rows = batch + if all_logits { step_tokens } else { 0 };
        let activation_bytes = activations.size_bytes();
        Sizes { batch, context, prompt, reached, step_tokens, logits_rows, activation_bytes, fp8_inputs }
    }
}

/// Bytes by purpose. Mapped weights are not among them: their pages belong to the file and can be dropped at
/// any time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Need {
    pub weights: u64,
    pub kv_cache: u64,
    pub workspace: u64,
    pub logits: u64,
    pub dump: u64,
    /// What repacking weights takes beyond what the steps take, which begin later.
    pub repacking: u64,
}

impl Need {
    /// The need of a run with activations of that type. `dump` is bytes. None stands for more than 2^63,
    /// there and in the result.
    pub fn of_run(
        config: &Config,
        sizes: &Sizes,
        activations: DType,
        weights: Option<Footprint>,
        dump: Option<u64>,
    ) -> Result<Option<Need>, Failure> {
        let scratch = match activations {
            DType::Bf16 => model::scratch_bytes::<Bf16>(config, sizes),
            DType::F16 => model::scratch_bytes::<F16>(config, sizes),
            _ => model::scratch_bytes::<f32>(config, sizes),
        };
        match (scratch, weights, dump) {
            (Ok(scratch), Some(weights), Some(dump)) => Ok(Need::of(config, sizes, scratch, weights, dump)),
            (Err(Error::TooLarge { .. }), ..) | (_, None, _) | (.., None) => Ok(None),
            (Err(error), ..) => Err(error.into()),
        }
    }

    /// The same; `scratch` is the workspace the operations ask for. None: beyond 2^63.
    pub fn of(config: &Config, sizes: &Sizes, scratch: usize, weights: Footprint, dump: u64) -> Option<Need> {
        let Sizes { batch, context, prompt, step_tokens, logits_rows, activation_bytes, .. } = *sizes;
        let heads = config.heads;
        let per_token = Columns::of(config)
            .sum()
            .checked_mul(activation_bytes)?
            .checked_add(4 + 16 * config.experts.map_or(0, |experts| experts.top_k))?;
        let angles = product(&[context, config.rope.rotary_dim, 4])?;
        // The prompts are there twice: sequence by sequence, and as one.
        let workspace = product(&[step_tokens, per_token])?
            .checked_add(angles)?
            .checked_add(product(&[2, batch, prompt, 4])?)?
            .checked_add(scratch as u64)?;
        let kv_cache = product(&[config.num_layers, batch, context, heads.kv_cols() + heads.v_cols(), activation_bytes])?;
        let logits = product(&[logits_rows, config.vocab, 4])?;
        let later = kv_cache.checked_add(workspace)?.checked_add(logits)?;
        let repacking = weights.passes.saturating_sub(later);
        let need = Need { weights: weights.stays, kv_cache, workspace, logits, dump, repacking };
        need.total().map(|_| need)
    }

    /// All together, or none beyond 2^63.
    pub fn total(&self) -> Option<u64> {
        let parts = [self.weights, self.kv_cache, self.workspace, self.logits, self.dump, self.repacking];
        parts.iter().try_fold(0u64, |sum, part| sum.checked_add(*part)).filter(|total| *total <= 1 << 63)
    }

    /// The parts that are not empty, in words.
    pub fn parts_text(&self) -> String {
        let named = [
            ("weights", self.weights),
            ("KV cache", self.kv_cache),
            ("workspace", self.workspace),
            ("logits", self.logits),
            ("dump", self.dump),
            ("repacking", self.repacking),
        ];
        let parts: Vec<String> =
            named.iter().filter(|(_, bytes)| *bytes > 0).map(|(name, bytes)| format!("{name} {}", bytes_text(*bytes))).collect();
        parts.join(", ")
    }

    /// Refuses a need above what is available.
    pub fn check(need: Option<Need>, available: Option<u64>) -> Result<Need, Failure> {
        let Some((need, total)) = need.and_then(|need| Some((need, need.total()?))) else {
            return refuse("memory: the run needs more than 2^63 bytes; try a smaller --context or --batch");
        };
        match available {
            Some(available) if total > available => refuse(format!(
                "memory: the run needs {} ({}), {} are available; {TRY}",
                bytes_text(total),
                need.parts_text(),
                bytes_text(available)
            )),
            _ => Ok(need),
        }
    }
}

/// Bytes of a checkpoint's parts: what is of no layer, and each of its layers.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// With the layers that always stay.
    pub outside: u64,
    /// Of each other layer.
    pub layer: u64,
    /// Layers that always stay: the first ones, where they differ from the others.
    pub first: usize,
    pub layers: usize,
}

/// How layers take turns with a GPU's memory, where not all of them fit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Streaming {
    /// The first layers stay there.
    pub resident: usize,
    /// All others are copied in every step, each to one of [`SLOTS`](Streaming::SLOTS).
    pub streamed: usize,
    pub layer_bytes: u64,
}

impl Streaming {
    /// Layers that there is room for besides the resident ones: one that is computed and one that arrives.
    pub const SLOTS: usize = 2;

    /// For the figures that are read by a program.
    pub fn json(&self) -> Value {
        json!({ "resident_layers": self.resident, "streamed_layers": self.streamed, "step_bytes": self.step_bytes() })
    }

    /// Bytes that every step copies.
    pub fn step_bytes(&self) -> u64 {
        self.streamed as u64 * self.layer_bytes
    }
}

/// What a run needs, of which as many layers as possible stay on the GPU if it is one that can stream the
/// others (`share`). `spare` bytes are left for other users of the memory there.
pub fn settle(need: Option<Need>, available: Option<u64>, share: Option<Share>, spare: u64) -> Result<(Need, Option<Streaming>), Failure> {
    let (Err(refusal), Some(need), Some(available), Some(share)) = (Need::check(need, available), need, available, share) else {
        return Ok((Need::check(need, available)?, None));
    };
    let with = |layers: usize| Need { weights: share.outside + layers as u64 * share.layer, ..need };
    let (least, layers) = (with(Streaming::SLOTS), share.layers - share.first);
    let Some(least_bytes) = least.total().filter(|_| layers > Streaming::SLOTS) else { return Err(refusal) };
    if least_bytes > available {
        return refuse(format!(
            "memory: the run needs {} ({}), or {} ({}) with its layers streamed, {} are available; {TRY}",
            bytes_text(need.total().unwrap_or(u64::MAX)),
            need.parts_text(),
            bytes_text(least_bytes),
            least.parts_text(),
            bytes_text(available)
        ));
    }
    let more = (available - least_bytes).saturating_sub(spare) / share.layer.max(1);
    let more = (more as usize).min(layers - Streaming::SLOTS - 1);
    let streaming = Streaming { resident: share.first + more, streamed: layers - more, layer_bytes: share.layer };
    Ok((with(more + Streaming::SLOTS), Some(streaming)))
}

/// What may help where memory is short.
const TRY: &str = "try a smaller --context, --batch or --chunk, or fewer --layers";

/// A product of sizes, or none beyond 2^63.
pub fn product(factors: &[usize]) -> Option<u64> {
    if factors.contains(&0) {
        return Some(0);
    }
    factors.iter().try_fold(1u64, |product, factor| product.checked_mul(*factor as u64)).filter(|product| *product <= 1 << 63)
}

/// What the machine could give without swapping, or the control groups or the limits of this process if that
/// is less, where they say so.
pub fn available_bytes() -> Option<u64> {
    let read = |name: &str| fs::read_to_string(Path::new("/proc").join(name)).ok();
    let machine = read("meminfo").and_then(|text| kibibytes(&text, "MemAvailable:"));
    let groups = read("self/cgroup").and_then(|text| groups_bytes(Path::new("/sys/fs/cgroup"), &text));
    let process = read("self/limits").zip(read("self/status")).and_then(|(limits, status)| process_bytes(&limits, &status));
    [machine, groups, process].into_iter().flatten().min()
}

/// What the control groups of a process have left: its own and those around it, each of which limits it.
/// `root` is where they are mounted, `groups` the text of `/proc/self/cgroup`: lines of a number, the
/// controllers and the group's path.
fn groups_bytes(root: &Path, groups: &str) -> Option<u64> {
    let left = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        // Version 2 has one tree for all controllers; of version 1 there is a tree for each.
        let (tree, names) = match controllers {
            "" => (root.to_owned(), &VERSION_2),
            list if list.split(',').any(|controller| controller == "memory") => (root.join("memory"), &VERSION_1),
            _ => return None,
        };
        // A container may see its own group as the root, and yet be told the whole path: then only the root
        // is there.
        let path = Path::new(path.trim_start_matches('/'));
        path.ancestors().filter_map(|group| group_bytes(&tree.join(group), names)).min()
    };
    groups.lines().filter_map(left).min()
}

/// The files of a group: the limit, what is used of it, and the lines of `memory.stat` that count pages of
/// files.
struct GroupFiles {
    limit: &'static str,
    used: &'static str,
    file_pages: [&'static str; 2],
}

const VERSION_1: GroupFiles = GroupFiles {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    file_pages: ["total_active_file ", "total_inactive_file "],
};
const VERSION_2: GroupFiles = GroupFiles { limit: "memory.max", used: "memory.current", file_pages: ["active_file ", "inactive_file "] };

/// What one control group has left: pages of files can be dropped, so they count as free.
fn group_bytes(folder: &Path, names: &GroupFiles) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let limit = number(names.limit)?; // none, or the word `max`: no limit
    let statistics = read("memory.stat").unwrap_or_default();
    let pages = |key: &&str| statistics.lines().find_map(|line| line.strip_prefix(*key))?.trim().parse::<u64>().ok();
    let files: u64 = names.file_pages.iter().filter_map(pages).sum();
    Some(limit.saturating_sub(number(names.used).unwrap_or(0).saturating_sub(files)))
}

/// What the limits of a process leave it: addresses, and memory that is its own. From `/proc/self/limits` and
/// `/proc/self/status`.
fn process_bytes(limits: &str, status: &str) -> Option<u64> {
    let left = |[limit, used]: [&str; 2]| {
        let soft = limits.lines().find_map(|line| line.strip_prefix(limit))?.split_whitespace().next()?;
        Some(soft.parse::<u64>().ok()?.saturating_sub(kibibytes(status, used)?))
    };
    [["Max address space", "VmSize:"], ["Max data size", "VmData:"]].into_iter().filter_map(left).min()
}

/// The most memory this process has had, mapped files included, where the machine says so.
pub fn peak_rss_bytes() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

fn anonymous_bytes() -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "RssAnon:")
}

/// The figure behind `key` in a file of lines such as `VmHWM:     1024 kB`.
fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Watches the process's anonymous memory, which the kernel keeps no peak of: a thread looks every 10 ms.
pub struct AnonymousPeak {
    peak: Arc<AtomicU64>,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    known: Arc<AtomicBool>,
}

impl AnonymousPeak {
    /// Begins to look.
    pub fn watch() -> AnonymousPeak {
        let (peak, known) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (stop, stopped) = mpsc::channel::<()>();
        let (seen, any) = (peak.clone(), known.clone());
        let look = move || {
            loop {
                if let Some(now) = anonymous_bytes() {
                    seen.fetch_max(now, Ordering::Relaxed);
                    any.store(true, Ordering::Relaxed);
                }
                if stopped.recv_timeout(Duration::from_millis(10)) != Err(mpsc::RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("memory".into()).spawn(look).ok();
        AnonymousPeak { peak, stop: Some(stop), thread, known }
    }

    /// Looks once more and gives the peak, where the machine says it.
    pub fn finish(mut self) -> Option<u64> {
        self.join();
        self.known.load(Ordering::Relaxed).then(|| self.peak.load(Ordering::Relaxed).max(anonymous_bytes().unwrap_or(0)))
    }

    fn join(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for AnonymousPeak {
    fn drop(&mut self) {
        self.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_the_system_are_read() {
        assert_eq!(kibibytes("VmHWM:\t    1024 kB\nRssAnon:\t 3 kB\n", "RssAnon:"), Some(3072));
        assert_eq!(kibibytes("VmHWM:", "VmHWM:"), None);
        assert_eq!(kibibytes("", "VmHWM:"), None);
    }

    /// A tree of control groups, by path and content, that goes when it is dropped.
    struct Groups(std::path::PathBuf);

    impl Groups {
        fn new(name: &str, files: &[(&str, &str)]) -> Groups {
            let root = std::env::temp_dir().join(format!("dropless-groups-{}-{name}", std::process::id()));
            for (file, text) in files {
                let file = root.join(file);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, text).unwrap();
            }
            Groups(root)
        }

        fn left(&self, groups: &str) -> Option<u64> {
            groups_bytes(&self.0, groups)
        }
    }

    impl Drop for Groups {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn groups_of_version_2_limit_what_is_inside_them() {
        let stat = "anon 500\nfile 350\nshmem 50\ninactive_file 100\nactive_file 200\n";
        let files = [
            ("a/memory.max", "1000\n"),
            ("a/memory.current", "800\n"),
            ("a/memory.stat", stat),
            ("a/b/memory.max", "max\n"),
            ("a/b/memory.current", "700\n"),
            ("a/b/c/memory.max", "900\n"),
            ("a/b/c/memory.current", "100\n"),
        ];
        let groups = Groups::new("v2", &files);
        assert_eq!(groups.left("0::/a/b\n"), Some(500)); // 1000 - (800 - 300)
        assert_eq!(groups.left("0::/a/b/c\n"), Some(500));
        assert_eq!(groups.left("0::/\n"), None);
        assert_eq!(groups.left("0::/elsewhere/x\n"), None);
        // Its own group is the root of what a container sees.
        let own = Groups::new("own", &[("memory.max", "100"), ("memory.current", "300"), ("memory.stat", "active_file 290\n")]);
        assert_eq!(own.left("0::/docker/0123\n"), Some(90));
        assert_eq!(own.left("0::/../../x\n"), Some(90));
    }

    #[test]
    fn groups_of_version_1_limit_memory_by_their_own_tree() {
        let no_limit = "9223372036854771712\n";
        let files = [
            ("memory/memory.limit_in_bytes", no_limit),
            ("memory/memory.usage_in_bytes", "5000"),
            ("memory/x/memory.limit_in_bytes", "2000"),
            ("memory/x/memory.usage_in_bytes", "1500"),
            ("memory/x/memory.stat", "cache 700\nactive_file 1\ntotal_inactive_file 400\ntotal_active_file 300\n"),
            ("memory/x/y/memory.limit_in_bytes", no_limit),
            ("cpu/x/y/memory.limit_in_bytes", "1"),
        ];
        let groups = Groups::new("v1", &files);
        let text = "12:cpu,cpuacct:/x/y\n5:memory:/x/y\n1:name=systemd:/x\n0::/x:with:colons\n";
        assert_eq!(groups.left(text), Some(1200)); // 2000 - (1500 - 700)
        assert_eq!(groups.left("5:hugetlb,memory:/x\n"), Some(1200));
        assert!(groups.left("5:memory:/\n").unwrap() > 1 << 60);
        assert_eq!(groups.left("2:cpu:/x/y\n"), None);
        assert!(["", "5", "5:memory", "garbage\n\n"].iter().all(|text| groups.left(text).is_none()));
    }

    #[test]
    fn limits_of_the_process() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max data size             unlimited            unlimited            bytes     \n\
                      Max address space         104857600            209715200            bytes     \n";
        let status = "VmPeak:\t   99999 kB\nVmSize:\t    2400 kB\nVmData:\t     400 kB\n";
        assert_eq!(process_bytes(limits, status), Some((102_400 - 2400) * 1024));
        assert_eq!(process_bytes(&limits.replace("104857600", "unlimited"), status), None);
        assert_eq!(process_bytes(&limits.replace("unlimited", "1048576"), status), Some((1024 - 400) * 1024));
        assert_eq!(process_bytes("", ""), None);
    }

    #[test]
    fn sums_and_products_do_not_wrap() {
        assert_eq!(product(&[usize::MAX, usize::MAX, 0]), Some(0));
        assert_eq!(product(&[1 << 40, 1 << 40]), None);
        let need = Need { weights: 1 << 63, kv_cache: 1 << 63, workspace: 0, logits: 0, dump: 0, repacking: 0 };
        assert!(need.total().is_none() && Need::check(Some(need), None).is_err());
    }

    /// As many layers stay as fit beside the two that take turns; where all fit, nothing is streamed.
    #[test]
    fn layers_share_what_there_is() {
        let share = Share { outside: 100, layer: 1000, first: 0, layers: 6 };
        let need = Need { weights: 6100, kv_cache: 30, workspace: 20, logits: 10, dump: 0, repacking: 0 };
        let settled = |available, spare| settle(Some(need), Some(available), Some(share), spare);
        let plan = |available, spare| settled(available, spare).unwrap().1.map(|plan| (plan.resident, plan.streamed, plan.step_bytes()));
        assert_eq!(
            [6160, 6159, 5160, 5159].map(|bytes| plan(bytes, 0)),
            [None, Some((3, 3, 3000)), Some((3, 3, 3000)), Some((2, 4, 4000))]
        );
        assert_eq!([2160, 3159, 3160].map(|bytes| plan(bytes, 0)), [Some((0, 6, 6000)), Some((0, 6, 6000)), Some((1, 5, 5000))]);
        assert_eq!([6160, 4160, 2160].map(|bytes| plan(bytes, 500)), [None, Some((1, 5, 5000)), Some((0, 6, 6000))]);
        assert_eq!(settled(3160, 0).unwrap().0, Need { weights: 3100, ..need });
        // A first layer that differs from the others stays: it is counted with what is of no layer.
        let mixed = Share { outside: 600, first: 1, layers: 7, ..share };
        let need_of_mixed = Need { weights: 6600, ..need };
        let of_mixed = |available| settle(Some(need_of_mixed), Some(available), Some(mixed), 0).unwrap().1;
        let plan = |available| of_mixed(available).map(|plan| (plan.resident, plan.streamed, plan.step_bytes()));
        assert_eq!([6660, 6659, 2660].map(plan), [None, Some((4, 3, 3000)), Some((1, 6, 6000))]);
        let text = settled(2159, 0).unwrap_err().text().unwrap();
        let (all, least) = ("6.02 KiB (weights 5.96 KiB, ", "2.11 KiB (weights 2.05 KiB, ");
        assert!([all, least, "with its layers streamed, 2.11 KiB are available"].iter().all(|part| text.contains(part)), "{text}");
        // Two layers are what the slots hold; and what is no checkpoint on a GPU is not streamed.
        let of = |share| settle(Some(need), Some(6000), share, 0).unwrap_err().text().unwrap();
        assert!([Some(Share { layers: 2, ..share }), None].into_iter().all(|share| !of(share).contains("streamed")));
        assert_eq!(settle(Some(need), None, Some(share), 0).unwrap().1, None);
    }
}
