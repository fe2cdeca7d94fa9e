//! What can be seen of a text, and what only pretends not to be there.
//!
//! Names refuse hidden characters, because two names that look alike must be alike. Messages keep what
//! is harmless (an emoji's joiner) and lose what a terminal would obey. Both decide by the tables here.

use std::borrow::Cow;

/// Makes a stranger's text safe to print on a terminal.
///
/// Control characters other than newline and tab (so ESC and the C1 range too) and the controls of text
/// direction become U+FFFD, one for one; all else stays. Borrows when there was nothing to replace.
pub fn sanitise(text: &str) -> Cow<'_, str> {
    replace(text, |c| match c {
        '\n' | '\t' => None,
        c => (c.is_control() || is_bidi_control(c)).then_some(char::REPLACEMENT_CHARACTER),
    })
}

/// As [`sanitise`], and on one line: newlines, tabs and the Unicode line and paragraph separators become
/// spaces, so that a stranger's name or error message cannot pass for a line of the program's own.
pub fn sanitise_line(text: &str) -> Cow<'_, str> {
    replace(text, |c| match c {
        '\n' | '\t' | '\u{2028}' | '\u{2029}' => Some(' '),
        c => (c.is_control() || is_bidi_control(c)).then_some(char::REPLACEMENT_CHARACTER),
    })
}

/// As [`sanitise`], with the lines kept as lines, and each one after the first indented by two spaces: what
/// stands at the margin is the program's own. Line and paragraph separators end lines too, and an end of
/// line at the end of the text is left out.
pub fn sanitise_block(text: &str) -> String {
    let text = text
        .replace("\r\n", "\n")
        .replace(['\u{2028}', '\u{2029}'], "\n");
    sanitise(text.trim_end_matches('\n')).replace('\n', "\n  ")
}

/// A stranger's word as a stranger's: on one line, in quotation marks, without any inside it, and with
/// nothing in it that cannot be seen.
pub fn quote(text: &str) -> String {
    let visible = |c| match c {
        '"' => '\'',
        c if is_hidden(c) => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    let visible: String = sanitise_line(text).chars().map(visible).collect();
    format!("\"{visible}\"")
}

/// Whether `c` draws nothing by itself: Unicode's general category Cf (format, with the bidi controls)
/// or its property Default_Ignorable_Code_Point (zero-width characters, fillers, variation selectors).
pub fn is_hidden(c: char) -> bool {
    let code = u32::from(c);
    HIDDEN
        .binary_search_by(|&(first, last)| {
            if last < code {
                std::cmp::Ordering::Less
            } else if first > code {
                std::cmp::Ordering::Greater
            } else {
                std::cmp::Ordering::Equal
            }
        })
        .is_ok()
}

fn is_bidi_control(c: char) -> bool {
    matches!(c, '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn replace(text: &str, with: impl Fn(char) -> Option<char>) -> Cow<'_, str> {
    let Some(first) = text.find(|c| with(c).is_some()) else {
        return Cow::Borrowed(text);
    };
    let (clean, rest) = text.split_at(first);
    let mut safe = String::with_capacity(text.len());
    safe.push_str(clean);
    safe.extend(rest.chars().map(|c| with(c).unwrap_or(c)));
    Cow::Owned(safe)
}

/// Unicode 17: Cf and Default_Ignorable_Code_Point, inclusive, sorted, neighbours joined.
const HIDDEN: [(u32, u32); 25] = [
    (0xad, 0xad),
    (0x34f, 0x34f),
    (0x600, 0x605),
    (0x61c, 0x61c),
    (0x6dd, 0x6dd),
    (0x70f, 0x70f),
    (0x890, 0x891),
    (0x8e2, 0x8e2),
    (0x115f, 0x1160),
    (0x17b4, 0x17b5),
    (0x180b, 0x180f),
    (0x200b, 0x200f),
    (0x202a, 0x202e),
    (0x2060, 0x206f),
    (0x3164, 0x3164),
    (0xfe00, 0xfe0f),
    (0xfeff, 0xfeff),
    (0xffa0, 0xffa0),
    (0xfff0, 0xfffb),
    (0x110bd, 0x110bd),
    (0x110cd, 0x110cd),
    (0x13430, 0x1343f),
    (0x1bca0, 0x1bca3),
    (0x1d173, 0x1d17a),
    (0xe0000, 0xe0fff),
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_table_is_sorted_and_its_ranges_are_apart() {
        assert!(HIDDEN.iter().all(|(first, last)| first <= last));
        assert!(HIDDEN.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0));
    }

    #[test]
    fn hidden_characters_are_recognised_at_both_ends_of_a_range() {
        for c in [
            '\u{ad}',
            '\u{200b}',
            '\u{200f}',
            '\u{2060}',
            '\u{feff}',
            '\u{e0fff}',
        ] {
            assert!(is_hidden(c), "{c:?}");
        }
        for c in ['a', ' ', 'é', '\u{200a}', '\u{2010}', '\u{fffd}', '😀'] {
            assert!(!is_hidden(c), "{c:?}");
        }
    }

    #[test]
    fn a_terminal_sees_no_escape_and_no_change_of_direction() {
        for (hostile, safe) in [
            ("\u{1b}[2Jgone", "\u{fffd}[2Jgone"),
            ("\u{9b}31mred", "\u{fffd}31mred"),
            ("over\rwritten\u{8}", "over\u{fffd}written\u{fffd}"),
            ("a\u{202e}txt.exe\u{2066}", "a\u{fffd}txt.exe\u{fffd}"),
            (
                "nul\0bell\u{7}del\u{7f}",
                "nul\u{fffd}bell\u{fffd}del\u{fffd}",
            ),
        ] {
            assert_eq!(sanitise(hostile), safe);
            assert_eq!(sanitise_line(hostile), safe);
        }
    }

    #[test]
    fn ordinary_text_is_borrowed_as_it_is() {
        for text in [
            "",
            "two\nlines\tand a tab",
            "👩\u{200d}👩\u{200d}👧 ❤\u{fe0f}",
            "שלום",
            "日本語",
        ] {
            assert!(matches!(sanitise(text), Cow::Borrowed(same) if same == text));
        }
    }

    #[test]
    fn a_line_stays_a_line() {
        assert_eq!(
            sanitise_line("bob\nerror:\tforged\u{2028}!"),
            "bob error: forged !"
        );
    }

    #[test]
    fn further_lines_are_indented_and_kept_as_lines() {
        for (text, block) in [
            ("", ""),
            ("one", "one"),
            ("one\n", "one"),
            ("one\r\n  two\n\nlast\r\n\r\n", "one\n    two\n  \n  last"),
            ("hi\u{2028}error:\u{2029}forged", "hi\n  error:\n  forged"),
            (
                "hi\rerror: \u{85}\u{b}\u{c}x",
                "hi\u{fffd}error: \u{fffd}\u{fffd}\u{fffd}x",
            ),
            ("\tone\n\ttwo", "\tone\n  \ttwo"),
        ] {
            assert_eq!(sanitise_block(text), block, "{text:?}");
        }
    }

    #[test]
    fn a_quoted_word_ends_where_it_ends() {
        for (text, quoted) in [
            ("bob", "\"bob\""),
            ("bob\" (you)", "\"bob' (you)\""),
            ("b\u{200b}ob\n\u{feff}", "\"b\u{fffd}ob \u{fffd}\""),
            ("\u{1b}[31m", "\"\u{fffd}[31m\""),
        ] {
            assert_eq!(quote(text), quoted, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_has_a_second_line_at_the_margin(text in any::<String>()) {
            let block = sanitise_block(&text);
            prop_assert!(block.lines().skip(1).all(|line| line.starts_with("  ")));
            prop_assert!(!block.contains(|c: char| c.is_control() && c != '\n' && c != '\t'));
            let quoted = quote(&text);
            prop_assert!(quoted.matches('"').count() == 2 && !quoted.contains(is_hidden));
        }

        #[test]
        fn what_is_safe_stays_as_it_is(text in any::<String>()) {
            let safe = sanitise(&text).into_owned();
            prop_assert_eq!(safe.chars().count(), text.chars().count());
            prop_assert!(!safe.contains(|c: char| c.is_control() && c != '\n' && c != '\t'));
            prop_assert!(matches!(sanitise(&safe), Cow::Borrowed(_)));
            prop_assert!(!sanitise_line(&text).contains(|c: char| c.is_control()));
        }
    }
}
