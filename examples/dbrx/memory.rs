//! How much memory a run needs, how much there is, and how much was used in the end.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use super::config::Config;
use super::failure::{Failure, refuse};
use super::report::bytes_text;

/// What decides the size of everything that is allocated for a run.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Sequences.
    pub batch: usize,
    /// Tokens of one sequence that the cache holds.
    pub context: usize,
    /// Tokens of the longest prompt.
    pub prompt: usize,
    /// Tokens of the largest step.
    pub step_tokens: usize,
    /// Rows of logits that one step may give.
    pub logits_rows: usize,
    /// Bytes of an activation.
    pub activation_bytes: usize,
}

/// Bytes by purpose. Mapped weights are not among them: their pages belong to the file and can be dropped at any time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Need {
    pub weights: u64,
    pub kv_cache: u64,
    pub workspace: u64,
    pub logits: u64,
    pub dump: u64,
}

impl Need {
    /// The need of a run; `weights` and `dump` are bytes, `scratch` the workspace the operations ask for. None: beyond 2^63.
    pub fn of(config: &Config, sizes: &Sizes, scratch: usize, weights: u64, dump: u64) -> Option<Need> {
        let Sizes { batch, context, prompt, step_tokens, logits_rows, activation_bytes } = *sizes;
        let heads = config.heads;
        let per_token = activation_columns(config).checked_mul(activation_bytes)?.checked_add(4 + 16 * config.top_k)?;
        let angles = product(&[context, heads.head_dim(), 4])?;
        // The prompts are there twice: sequence by sequence, and as one.
        let workspace = product(&[step_tokens, per_token])?
            .checked_add(angles)?
            .checked_add(product(&[2, batch, prompt, 4])?)?
            .checked_add(scratch as u64)?;
        let need = Need {
            weights,
            kv_cache: product(&[2, config.num_layers, batch, context, heads.kv_cols(), activation_bytes])?,
            workspace,
            logits: product(&[logits_rows, config.vocab, 4])?,
            dump,
        };
        need.total().map(|_| need)
    }

    /// All together, or none beyond 2^63.
    pub fn total(&self) -> Option<u64> {
        let parts = [self.weights, self.kv_cache, self.workspace, self.logits, self.dump];
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
                "memory: the run needs {} ({}), {} are available; try a smaller --context, --batch or --chunk, or fewer --layers",
                bytes_text(total),
                need.parts_text(),
                bytes_text(available)
            )),
            _ => Ok(need),
        }
    }
}

/// Columns of all activation buffers together: residual, norm, output, queries, context; the fused projection.
pub fn activation_columns(config: &Config) -> usize {
    3 * config.d_model + 2 * config.heads.q_cols() + config.heads.qkv_cols()
}

/// A product of sizes, or none beyond 2^63.
pub fn product(factors: &[usize]) -> Option<u64> {
    if factors.contains(&0) {
        return Some(0);
    }
    factors.iter().try_fold(1u64, |product, factor| product.checked_mul(*factor as u64)).filter(|product| *product <= 1 << 63)
}

/// What the machine could give without swapping, or the control group if that is less, where they say so.
pub fn available_bytes() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| kibibytes(&text, "MemAvailable:"));
    [machine, group_bytes("/sys/fs/cgroup")].into_iter().flatten().min()
}

/// What a control group (version 2) has left: pages of files can be dropped, so they count as free.
fn group_bytes(folder: &str) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(format!("{folder}/{name}")).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let statistics = read("memory.stat")?;
    let files: u64 = statistics.lines().find_map(|line| line.strip_prefix("file "))?.trim().parse().ok()?;
    Some(number("memory.max")?.saturating_sub(number("memory.current")?.saturating_sub(files)))
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
        assert_eq!(group_bytes("/nowhere"), None);
    }

    #[test]
    fn sums_and_products_do_not_wrap() {
        assert_eq!(product(&[usize::MAX, usize::MAX, 0]), Some(0));
        assert_eq!(product(&[1 << 40, 1 << 40]), None);
        let need = Need { weights: 1 << 63, kv_cache: 1 << 63, workspace: 0, logits: 0, dump: 0 };
        assert!(need.total().is_none() && Need::check(Some(need), None).is_err());
    }
}
