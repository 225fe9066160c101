//! Files that are read whole, and what of them is said: both have an end, whatever lies on disk.

use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::failure::{Failure, io_text, refuse_file};

/// A text that is longer is refused, as a longer header of weights is.
pub const MAX_TEXT_BYTES: u64 = 100_000_000;

/// Reads a text of at most `max_bytes` from a file, not from a device or a pipe.
pub fn read_text(path: &Path, max_bytes: u64) -> Result<String, Failure> {
    check_kind(path).or_else(|error| refuse_file(path, io_text(&error)))?;
    read_stream(path, max_bytes)
}

/// The same from whatever gives bytes: a pipe is waited for.
pub fn read_stream(path: &Path, max_bytes: u64) -> Result<String, Failure> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(max_bytes + 1).read_to_string(&mut text));
    read.or_else(|error| refuse_file(path, io_text(&error)))?;
    if text.len() as u64 > max_bytes {
        return refuse_file(path, format_args!("must have at most {max_bytes} bytes, and has more"));
    }
    Ok(text)
}

/// An error unless it is a file. Asked before it is opened: opening a pipe would wait for somebody to write
/// to it.
pub fn check_kind(path: &Path) -> std::io::Result<()> {
    let kind = std::fs::metadata(path)?;
    if kind.is_dir() {
        return Err(std::io::ErrorKind::IsADirectory.into());
    }
    if !kind.is_file() {
        return Err(std::io::Error::other("is a device or a pipe, not a file"));
    }
    Ok(())
}

/// What a file says, cut in the middle where it is long.
pub fn brief(text: impl std::fmt::Display) -> String {
    const FIRST: usize = 80;
    const LAST: usize = 40;
    let text = text.to_string();
    let (first, last) = (text.char_indices().nth(FIRST), text.char_indices().nth_back(LAST - 1));
    match (first, last) {
        (Some((first, _)), Some((last, _))) if first < last => format!("{}...{}", &text[..first], &text[last..]),
        _ => text,
    }
}

/// A text as a terminal may have it: what would move its cursor, or turn what follows around, is spelled out.
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        let turns = matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || turns {
            let _ = write!(shown, "{}", c.escape_debug());
        } else {
            shown.push(c);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_in_the_middle() {
        assert_eq!(brief("short"), "short");
        let (exact, long) = ("é".repeat(120), format!("{}{}", "é".repeat(500), "x".repeat(40)));
        assert_eq!(brief(&exact), exact);
        assert_eq!(brief(long), format!("{}...{}", "é".repeat(80), "x".repeat(40)));
    }

    #[test]
    fn texts_do_not_command_a_terminal() {
        assert_eq!(printable("\x1b[2J \x1b]0;t\x07 \u{9b}5A a\nb"), "\\u{1b}[2J \\u{1b}]0;t\\u{7} \\u{9b}5A a\\nb");
        assert_eq!(printable("\u{202e}evil\u{2069}"), "\\u{202e}evil\\u{2069}");
        assert_eq!(printable("it's \"fine\" \\ über"), "it's \"fine\" \\ über");
    }
}
