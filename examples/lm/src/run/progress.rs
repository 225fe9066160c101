//! Progress bars on stderr, silent where nobody watches.

use indicatif::{ProgressBar, ProgressStyle};

/// Makes bars, or pretends to.
#[derive(Clone, Copy)]
pub struct Progress {
    watched: bool,
}

impl Progress {
    /// `watched`: stderr is a terminal.
    pub fn new(watched: bool) -> Progress {
        Progress { watched }
    }

    /// A bar that counts things, where it has more than one step to show.
    pub fn count(&self, what: &'static str, total: u64, steps: bool) -> ProgressBar {
        if !steps {
            return ProgressBar::hidden();
        }
        self.bar(what, total, "  {msg:<10} {wide_bar:.dim} {human_pos} of {human_len}  {eta}")
    }

    /// A bar that counts bytes.
    pub fn bytes(&self, what: &'static str, total: u64) -> ProgressBar {
        self.bar(what, total, "  {msg:<10} {wide_bar:.dim} {bytes} of {total_bytes}  {bytes_per_sec}  {eta}")
    }

    fn bar(&self, what: &'static str, total: u64, template: &str) -> ProgressBar {
        if !self.watched {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸ ");
        ProgressBar::new(total).with_style(style).with_message(what).with_finish(indicatif::ProgressFinish::AndClear)
    }
}
