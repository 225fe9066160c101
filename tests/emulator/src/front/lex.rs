//! Tokens of PTX text, with their lines.

use super::FrontError;

/// One token. Text is borrowed from the image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Tok<'a> {
    /// Identifier: `%r1`, `$L__BB0_1`, `ld`, `_`.
    Word(&'a str),
    /// Dotted word without its dot: `global`, `L1::no_allocate`, `2d`.
    Dot(&'a str),
    /// Integer literal, its sign not included.
    Int(u64),
    /// `0f` literal.
    F32(u32),
    /// `0d` literal or a decimal with a fraction.
    F64(u64),
    /// Quoted text without its quotes.
    Str(&'a str),
    /// One character of punctuation.
    Punct(u8),
    End,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Token<'a> {
    pub tok: Tok<'a>,
    pub line: u32,
}

fn is_word_start(b: u8) -> bool {
    b.is_ascii_alphabetic() || matches!(b, b'_' | b'$' | b'%')
}

fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'_' | b'$')
}

/// Splits text into tokens; the last one is [`Tok::End`].
pub(crate) fn lex(text: &str) -> Result<Vec<Token<'_>>, FrontError> {
    let b = text.as_bytes();
    let mut out = Vec::with_capacity(b.len() / 4 + 1);
    let (mut i, mut line) = (0, 1u32);
    while i < b.len() {
        let at = |j: usize| b.get(j).copied().unwrap_or(0);
        match b[i] {
            b'\n' => {
                line += 1;
                i += 1;
            }
            c if c.is_ascii_whitespace() => i += 1,
            b'/' if at(i + 1) == b'/' => {
                while i < b.len() && b[i] != b'\n' {
                    i += 1;
                }
            }
            b'/' if at(i + 1) == b'*' => {
                let start = line;
                i += 2;
                loop {
                    if i + 1 >= b.len() {
                        return Err(FrontError::new(start, "comment is not closed"));
                    }
                    if b[i] == b'*' && b[i + 1] == b'/' {
                        break;
                    }
                    line += u32::from(b[i] == b'\n');
                    i += 1;
                }
                i += 2;
            }
            b'"' => {
                let start = i + 1;
                let mut j = start;
                while j < b.len() && b[j] != b'"' && b[j] != b'\n' {
                    j += 1;
                }
                if at(j) != b'"' {
                    return Err(FrontError::new(line, "string is not closed"));
                }
                out.push(Token { tok: Tok::Str(&text[start..j]), line });
                i = j + 1;
            }
            b'.' if is_word(at(i + 1)) => {
                let start = i + 1;
                let mut j = start;
                loop {
                    if is_word(at(j)) {
                        j += 1;
                    } else if at(j) == b':' && at(j + 1) == b':' && is_word(at(j + 2)) {
                        j += 2;
                    } else {
                        break;
                    }
                }
                out.push(Token { tok: Tok::Dot(&text[start..j]), line });
                i = j;
            }
            c if c.is_ascii_digit() => {
                let (tok, next) = number(text, i).map_err(|m| FrontError::new(line, m))?;
                out.push(Token { tok, line });
                i = next;
            }
            c if is_word_start(c) => {
                let mut j = i + 1;
                while is_word(at(j)) {
                    j += 1;
                }
                out.push(Token { tok: Tok::Word(&text[i..j]), line });
                i = j;
            }
            c @ (b'{' | b'}' | b'(' | b')' | b'[' | b']' | b'<' | b'>' | b',' | b';' | b':' | b'@' | b'!' | b'|' | b'+' | b'-' | b'='
            | b'*') => {
                out.push(Token { tok: Tok::Punct(c), line });
                i += 1;
            }
            _ => {
                let c = text[i..].chars().next().unwrap_or(' ');
                return Err(FrontError::new(line, format!("unexpected character {c:?}")));
            }
        }
    }
    out.push(Token { tok: Tok::End, line });
    Ok(out)
}

/// The number at byte `i` and the byte after it.
fn number(text: &str, i: usize) -> Result<(Tok<'_>, usize), String> {
    let b = text.as_bytes();
    let run = |from: usize, ok: fn(u8) -> bool| from + b[from..].iter().take_while(|&&c| ok(c)).count();
    let end = run(i, |c| c.is_ascii_alphanumeric());
    let word = &text[i..end];
    let bad = || format!("bad number `{word}`");
    let radix = |digits: &str, radix: u32| u64::from_str_radix(digits.trim_end_matches(['U', 'u']), radix).map(Tok::Int).map_err(|_| bad());
    let tok = match word.as_bytes() {
        [b'0', b'x' | b'X', ..] => radix(&word[2..], 16)?,
        [b'0', b'f' | b'F', ..] if word.len() == 10 => Tok::F32(u32::from_str_radix(&word[2..], 16).map_err(|_| bad())?),
        [b'0', b'd' | b'D', ..] if word.len() == 18 => Tok::F64(u64::from_str_radix(&word[2..], 16).map_err(|_| bad())?),
        [b'0', b'b' | b'B', ..] => radix(&word[2..], 2)?,
        _ if b.get(end) == Some(&b'.') && b.get(end + 1).is_some_and(u8::is_ascii_digit) => {
            let frac = run(end + 1, |c| c.is_ascii_digit());
            let value: f64 = text[i..frac].parse().map_err(|_| bad())?;
            return Ok((Tok::F64(value.to_bits()), frac));
        }
        [b'0', _, ..] if !word[1..].starts_with(['U', 'u']) => radix(&word[1..], 8)?,
        _ => radix(word, 10)?,
    };
    Ok((tok, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_numbers_and_lines() {
        let toks: Vec<_> =
            lex("ld.L1::no_allocate %r1, 0x1F; // c\n 0f3F800000 017 1.5 $L:").unwrap().into_iter().map(|t| (t.tok, t.line)).collect();
        let p = |c| Tok::Punct(c);
        assert_eq!(
            toks,
            [
                (Tok::Word("ld"), 1),
                (Tok::Dot("L1::no_allocate"), 1),
                (Tok::Word("%r1"), 1),
                (p(b','), 1),
                (Tok::Int(31), 1),
                (p(b';'), 1),
                (Tok::F32(0x3f80_0000), 2),
                (Tok::Int(15), 2),
                (Tok::F64(1.5f64.to_bits()), 2),
                (Tok::Word("$L"), 2),
                (p(b':'), 2),
                (Tok::End, 2),
            ]
        );
    }

    #[test]
    fn refusals() {
        assert_eq!(lex("a\n/* b").unwrap_err(), FrontError::new(2, "comment is not closed"));
        assert_eq!(lex("\"b").unwrap_err().message, "string is not closed");
        assert_eq!(lex("0xZZ").unwrap_err().message, "bad number `0xZZ`");
        assert_eq!(lex("é").unwrap_err().message, "unexpected character 'é'");
    }
}
