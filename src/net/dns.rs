//! DNS messages as bytes (RFC 1035 section 4): header, question and records, looked at in place.
//!
//! Comes in: a message of a guest, or its beginning. Goes out: parts of it, as slices, or what is
//! wrong with it; domain names in wire format. What a name means is not decided here. Names of
//! records are passed over, never followed, so no compression pointer can lead in circles.

/// Bytes of a header (RFC 1035 4.1.1).
pub const HEADER: usize = 12;
/// Longest name in wire format, the root's label included (RFC 1035 2.3.4).
pub const MAX_NAME: usize = 255;
/// Longest label (RFC 1035 2.3.4).
pub const MAX_LABEL: usize = 63;
/// Bytes of a message up to the end of its longest question: enough to tell what is asked.
pub const MAX_QUESTION_END: usize = HEADER + MAX_NAME + 4;

/// Bits of the header's third byte.
pub mod flags {
    /// A response.
    pub const RESPONSE: u8 = 0x80;
    /// Where the kind of query stands; 0 is QUERY.
    pub const OPCODE: u8 = 0x78;
    /// The answer comes from an authority.
    pub const AUTHORITATIVE: u8 = 0x04;
    /// Recursion desired.
    pub const RECURSION_DESIRED: u8 = 0x01;
}

/// Bits of the header's fourth byte, whose last four are the response code.
pub mod more_flags {
    /// Recursion available.
    pub const RECURSION_AVAILABLE: u8 = 0x80;
    /// Checking disabled (RFC 4035 3.2.2).
    pub const CHECKING_DISABLED: u8 = 0x10;
}

/// Types of records and of questions.
pub mod kind {
    /// An IPv4 address.
    pub const A: u16 = 1;
    /// The start of a zone of authority.
    pub const SOA: u16 = 6;
    /// A pointer to another name.
    pub const PTR: u16 = 12;
    /// An IPv6 address (RFC 3596).
    pub const AAAA: u16 = 28;
    /// The pseudo-record of EDNS (RFC 6891).
    pub const OPT: u16 = 41;
    /// A question for whatever there is.
    pub const ANY: u16 = 255;
}

/// Classes of records and of questions.
pub mod class {
    /// The Internet.
    pub const IN: u16 = 1;
    /// A question for every class.
    pub const ANY: u16 = 255;
}

/// Why a part of a message can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unreadable {
    /// The bytes end before the part does.
    Truncated,
    /// No bytes that could follow would make it right.
    Malformed,
}

/// A header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Number of the exchange.
    pub id: u16,
    /// The third byte, see [`flags`].
    pub flags: u8,
    /// The fourth byte, see [`more_flags`].
    pub more_flags: u8,
    /// Number of questions.
    pub questions: u16,
    /// Number of records in the answer, authority and additional sections.
    pub records: [u16; 3],
}

/// A question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question<'a> {
    /// The name, in wire format, without compression.
    pub name: &'a [u8],
    /// Type of the records asked for.
    pub kind: u16,
    /// Their class.
    pub class: u16,
    /// Where in the message the question ends.
    pub end: usize,
}

/// A record, without its name, which may be compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// It belongs to the root.
    pub of_root: bool,
    /// Type.
    pub kind: u16,
    /// Class; the sender's payload size in an OPT record.
    pub class: u16,
    /// Time to live in seconds; flags in an OPT record.
    pub ttl: u32,
    /// Contents.
    pub data: &'a [u8],
    /// Where in the message the record ends.
    pub end: usize,
}

/// Reads the header of a message.
#[must_use]
pub fn header(message: &[u8]) -> Option<Header> {
    let [id, id_low, flags, more_flags, counts @ ..] = *message.first_chunk::<HEADER>()?;
    let count = |at: usize| u16::from_be_bytes([counts[at], counts[at + 1]]);
    Some(Header {
        id: u16::from_be_bytes([id, id_low]),
        flags,
        more_flags,
        questions: count(0),
        records: [count(2), count(4), count(6)],
    })
}

/// Reads the question behind the header of a message.
///
/// # Errors
/// When the bytes end too soon, or hold something else than labels: a compression pointer has
/// nothing to point to there.
pub fn question(message: &[u8]) -> Result<Question<'_>, Unreadable> {
    let mut end = HEADER;
    loop {
        let len = *message.get(end).ok_or(Unreadable::Truncated)?;
        end += 1 + usize::from(len);
        if usize::from(len) > MAX_LABEL || end - HEADER > MAX_NAME {
            return Err(Unreadable::Malformed);
        }
        if len == 0 {
            break;
        }
    }
    let name = message.get(HEADER..end).ok_or(Unreadable::Truncated)?;
    Ok(Question {
        name,
        kind: u16_at(message, end).ok_or(Unreadable::Truncated)?,
        class: u16_at(message, end + 2).ok_or(Unreadable::Truncated)?,
        end: end + 4,
    })
}

/// Reads the record that begins at `start`.
#[must_use]
pub fn record(message: &[u8], start: usize) -> Option<Record<'_>> {
    let fixed = name_end(message, start)?;
    let ttl = [u16_at(message, fixed + 4)?, u16_at(message, fixed + 6)?];
    let (data, end) = (fixed + 10, usize::from(u16_at(message, fixed + 8)?));
    Some(Record {
        of_root: fixed == start + 1,
        kind: u16_at(message, fixed)?,
        class: u16_at(message, fixed + 2)?,
        ttl: u32::from(ttl[0]) << 16 | u32::from(ttl[1]),
        data: message.get(data..data + end)?,
        end: data + end,
    })
}

/// Passes over a name, which may end in a compression pointer (RFC 1035 4.1.4).
fn name_end(message: &[u8], start: usize) -> Option<usize> {
    let mut at = start;
    loop {
        let len = usize::from(*message.get(at)?);
        match len {
            0 => return Some(at + 1),
            1..=MAX_LABEL => at += 1 + len,
            0xc0.. => return Some(at + 2),
            // Kinds of labels that never came to be (RFC 6891 section 5).
            _ => return None,
        }
        if at - start > MAX_NAME {
            return None;
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_be_bytes(*pair))
}

/// Splits a name in wire format into its first label and the name above. `None` for the root.
#[must_use]
pub fn split_label(name: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&len, rest) = name.split_first()?;
    if len == 0 {
        return None;
    }
    rest.split_at_checked(usize::from(len))
}

/// Writes a domain name in wire format, without compression. `None` where it has none: it is empty,
/// not ASCII, or one of its labels or the whole is too long.
#[must_use]
pub fn encode_name(text: &str) -> Option<Vec<u8>> {
    let text = text.strip_suffix('.').unwrap_or(text);
    let mut name = Vec::with_capacity(text.len() + 2);
    for label in text.split('.') {
        let len = u8::try_from(label.len()).ok()?;
        if len == 0 || label.len() > MAX_LABEL || !label.bytes().all(|byte| byte.is_ascii_graphic())
        {
            return None;
        }
        name.push(len);
        name.extend(label.as_bytes());
    }
    name.push(0);
    (name.len() <= MAX_NAME).then_some(name)
}

/// As many of `names`, in order, as fit into `room` bytes; what is no name is left out.
#[must_use]
pub fn encode_names<T: AsRef<str>>(names: &[T], room: usize) -> Vec<u8> {
    let mut encoded = Vec::new();
    for name in names {
        let name = encode_name(name.as_ref()).unwrap_or_default();
        if encoded.len() + name.len() <= room {
            encoded.extend(name);
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(rest: &[u8]) -> Vec<u8> {
        let mut message = vec![0; HEADER];
        message.extend(rest);
        message
    }

    #[test]
    fn questions_are_read_in_place() {
        let bytes = message(b"\x01a\x02Bc\0\0\x1c\0\x01rest");
        let question = question(&bytes).unwrap();
        assert_eq!(question.name, b"\x01a\x02Bc\0");
        assert_eq!((question.kind, question.class), (kind::AAAA, class::IN));
        assert_eq!(&bytes[question.end..], b"rest");
        let (label, above) = split_label(question.name).unwrap();
        assert_eq!((label, above), (&b"a"[..], &b"\x02Bc\0"[..]));
        assert_eq!(split_label(b"\0"), None);
    }

    #[test]
    fn a_question_may_be_incomplete_or_wrong() {
        let whole = message(b"\x01a\x02Bc\0\0\x1c\0\x01");
        for len in HEADER..whole.len() {
            assert_eq!(question(&whole[..len]), Err(Unreadable::Truncated), "{len}");
        }
        for wrong in [&b"\x40"[..], b"\x80", b"\xc0\x0c", b"\x01a\xc0\x0c"] {
            let wrong = message(wrong);
            assert_eq!(question(&wrong), Err(Unreadable::Malformed), "{wrong:?}");
        }
    }

    #[test]
    fn a_name_of_255_bytes_is_the_longest() {
        let mut name = [&[63][..], &[b'a'; 63]].concat().repeat(3);
        name.push(61);
        name.extend([b'b'; 61]);
        name.extend([0, 0, 1, 0, 1]);
        let bytes = message(&name);
        assert_eq!(question(&bytes).unwrap().name.len(), MAX_NAME);
        assert_eq!(bytes.len(), MAX_QUESTION_END);
        name[192] = 62;
        assert_eq!(question(&message(&name)), Err(Unreadable::Malformed));
    }

    #[test]
    fn records_are_passed_over() {
        let bytes = message(b"\0\0\x29\x04\xd0\x01\x02\x03\x04\0\x02hi\x01a\xc0\x0c\0\x01");
        let opt = record(&bytes, HEADER).unwrap();
        assert!(opt.of_root);
        assert_eq!(
            (opt.kind, opt.class, opt.ttl),
            (kind::OPT, 1232, 0x0102_0304)
        );
        assert_eq!(opt.data, b"hi");
        assert_eq!(record(&bytes, opt.end), None, "the second is cut off");
        assert_eq!(name_end(&bytes, opt.end), Some(opt.end + 4));
        assert_eq!(record(&bytes, usize::from(u16::MAX)), None);
    }

    #[test]
    fn names_that_can_t_be_written_are_none() {
        assert_eq!(encode_name("a.example.").unwrap(), b"\x01a\x07example\0");
        let long = "a".repeat(64);
        let many = "a.".repeat(127);
        assert_eq!(encode_name(&many).unwrap().len(), MAX_NAME);
        let too_many = "a.".repeat(128);
        for bad in [
            "",
            ".",
            "a..b",
            ".a",
            "bücher.example",
            "a b",
            &long,
            &too_many,
        ] {
            assert_eq!(encode_name(bad), None, "{bad}");
        }
    }
}
