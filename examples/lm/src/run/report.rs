//! What a run prints: aligned columns, human units, calm colours where a person looks on.

use std::io::{ErrorKind, IsTerminal, Write};

use super::failure::{Failure, refuse};

/// Where a run writes, and whether somebody watches.
pub struct Console<'a> {
    pub out: &'a mut dyn Write,
    pub err: &'a mut dyn Write,
    /// Colours on `out`.
    pub colour: bool,
    /// Progress bars on the process's stderr.
    pub progress: bool,
    /// Whether the run goes on when nobody reads `out` any more, since it writes a file as well.
    pub go_on: bool,
}

impl Console<'_> {
    /// The process's terminal, and what `run` gives there.
    pub fn of_process<T>(run: impl FnOnce(&mut Console<'_>) -> T) -> T {
        let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
        let colour = out.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let progress = err.is_terminal();
        run(&mut Console { out: &mut out, err: &mut err, colour, progress, go_on: false })
    }

    /// The exit code of a command line that was not understood, or asked for help.
    pub fn not_parsed(&mut self, error: &clap::Error) -> u8 {
        // Help is what was asked for; everything else is a refusal.
        let stream = if error.use_stderr() { &mut *self.err } else { &mut *self.out };
        let _ = write!(stream, "{error}");
        error.exit_code() as u8
    }

    /// The exit code of a run, of which a failure is printed.
    pub fn ended(&mut self, done: Result<(), Failure>) -> u8 {
        let Err(failure) = done else { return 0 };
        if let Some(text) = failure.text() {
            let _ = writeln!(self.err, "{text}");
        }
        failure.exit_code()
    }

    /// A line of the report.
    pub fn line(&mut self, text: impl AsRef<str>) -> Result<(), Failure> {
        self.write(&format!("{}\n", text.as_ref()))
    }

    /// Part of a line, shown at once.
    pub fn write(&mut self, text: &str) -> Result<(), Failure> {
        let written = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
        match written {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                if self.go_on {
                    Ok(())
                } else {
                    Err(Failure::Unheard)
                }
            }
            written => written.or_else(|error| refuse(format!("stdout: {error}"))),
        }
    }

    /// A labelled line: `  label      text`.
    pub fn item(&mut self, label: &str, text: impl AsRef<str>) -> Result<(), Failure> {
        let label = self.dim(&format!("{label:<14}"));
        self.line(format!("  {label}{}", text.as_ref()))
    }

    /// An empty line and a heading.
    pub fn heading(&mut self, text: &str) -> Result<(), Failure> {
        let text = self.strong(text);
        self.line(format!("\n{text}"))
    }

    pub fn strong(&self, text: &str) -> String {
        self.paint("1", text)
    }

    pub fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }

    pub fn good(&self, text: &str) -> String {
        self.paint("32", text)
    }

    pub fn bad(&self, text: &str) -> String {
        self.paint("1;31", text)
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// Rows of cells under headings. The first column is aligned to the left; so are those whose heading begins with a blank.
pub struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(headings: &[&'static str]) -> Table {
        Table { headings: headings.to_vec(), rows: Vec::new() }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub fn print(&self, console: &mut Console<'_>) -> Result<(), Failure> {
        let headings: Vec<String> = self.headings.iter().map(|heading| heading.trim().to_owned()).collect();
        let cells = || self.rows.iter().chain(std::iter::once(&headings));
        let width = |column: usize| cells().map(|row| row.get(column).map_or(0, |cell| cell.chars().count())).max().unwrap_or(0);
        let widths: Vec<usize> = (0..headings.len()).map(width).collect();
        let layout = |row: &[String]| {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let left = column == 0 || self.headings[column].starts_with(' ');
                line += &if left { format!("  {cell:<width$}") } else { format!("  {cell:>width$}") };
            }
            line.trim_end().to_owned()
        };
        let heading = console.dim(&layout(&headings));
        console.line(heading)?;
        self.rows.iter().try_for_each(|row| console.line(layout(row)))
    }
}

/// Columns of a histogram at most: more experts share columns.
const MAX_BARS: usize = 64;

/// Counts as bars between nothing and the largest.
pub fn bars(counts: &[u64]) -> String {
    const LEVELS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let share = counts.len().div_ceil(MAX_BARS).max(1);
    let sums: Vec<u64> = counts.chunks(share).map(|chunk| chunk.iter().sum()).collect();
    let most = sums.iter().copied().max().unwrap_or(0).max(1);
    // Rounded up, so that one token is visible beside a thousand.
    sums.iter().map(|sum| LEVELS[(8 * sum).div_ceil(most) as usize]).collect()
}

/// Three digits that count.
fn three(x: f64) -> String {
    match x {
        x if x >= 99.95 => format!("{x:.0}"),
        x if x >= 9.995 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    }
}

/// The value in the largest unit that leaves at least 1 before the point.
fn scaled(value: f64, step: f64, units: &[&str]) -> String {
    let (mut value, mut unit) = (value, 0);
    // Half a unit of the last digit early, so that nothing is printed as 1000.
    while value >= step * 0.9995 && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    format!("{} {}", three(value), units[unit]).trim_end().to_owned()
}

/// `12 B`, `3.64 MiB`.
pub fn bytes_text(bytes: u64) -> String {
    if bytes < 1024 { format!("{bytes} B") } else { scaled(bytes as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]) }
}

/// `649`, `650 k`, `132 B`.
pub fn count_text(count: u64) -> String {
    if count < 1000 { count.to_string() } else { scaled(count as f64, 1000.0, &["", "k", "M", "B", "T", "Q"]) }
}

/// `1.20 ms`, `3.40 s`.
pub fn seconds_text(seconds: f64) -> String {
    match seconds {
        s if s < 0.9995e-3 => format!("{} us", three(s * 1e6)),
        s if s < 0.9995 => format!("{} ms", three(s * 1e3)),
        s => format!("{} s", three(s)),
    }
}

/// `10000 tokens/s`.
pub fn rate_only_text(tokens_per_s: f64) -> String {
    format!("{} tokens/s", three(tokens_per_s))
}

/// `12 tokens in 1.20 ms, 10000 tokens/s`.
pub fn rate_text(tokens: usize, seconds: f64) -> String {
    let plural = if tokens == 1 { "" } else { "s" };
    let rate = if seconds > 0.0 { format!(", {}", rate_only_text(tokens as f64 / seconds)) } else { String::new() };
    format!("{tokens} token{plural} in {}{rate}", seconds_text(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_keep_three_digits() {
        assert_eq!([0, 1023, 1024, 3_815_000, 1 << 40].map(bytes_text), ["0 B", "1023 B", "1.00 KiB", "3.64 MiB", "1.00 TiB"]);
        assert_eq!([999, 649_536, 999_999, 131_600_000_000].map(count_text), ["999", "650 k", "1.00 M", "132 B"]);
        assert_eq!([1.5e-6, 0.0123, 0.99999, 75.0].map(seconds_text), ["1.50 us", "12.3 ms", "1.00 s", "75.0 s"]);
        assert_eq!(rate_text(12, 0.5), "12 tokens in 500 ms, 24.0 tokens/s");
        assert_eq!(rate_text(1, 0.0), "1 token in 0.00 us");
    }

    #[test]
    fn bars_show_the_smallest_and_share_columns() {
        assert_eq!(bars(&[0, 1, 500, 1000]), " ▁▄█");
        assert_eq!(bars(&[0, 0]), "  ");
        assert_eq!(bars(&[1; 256]).chars().count(), 64);
        assert_eq!(bars(&[]), "");
    }
}
