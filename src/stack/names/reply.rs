//! Answers about the gateway's own names, as bytes.
//!
//! Comes in: the query and what is to be told. Goes out: a message. Our answers are short: they
//! fit 512 bytes, so that none is ever truncated.

use crate::net::dns::{self, Header, Question, class, flags, kind, more_flags};

use super::{Asked, GATEWAY};

/// Seconds that answers may be kept: a name leads elsewhere only in another run of tapgate.
const TTL: u32 = 60;
/// The payload that we say to take over UDP (RFC 6891 6.2.5): what the smallest IPv6 packet brings.
const UDP_PAYLOAD: u16 = 1232;
/// DNSSEC records are welcome (RFC 3225), in the flags of an OPT record.
const DNSSEC_OK: u32 = 0x8000;
/// "Bad version" in the upper eight bits of the extended code (RFC 6891 6.1.3); the lower are 0.
const BAD_VERSION: u32 = 1 << 24;

const FORM_ERROR: u8 = 1;
const NAME_ERROR: u8 = 3;

/// A name of a record that stands in the question: a compression pointer (RFC 1035 4.1.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner(u16);

impl Owner {
    /// The name that begins at byte `offset` of the message, which is in the question.
    pub(super) fn at(offset: usize) -> Self {
        Self(0xc000 | u16::try_from(offset).unwrap_or(0))
    }
}

/// The OPT record of a query (RFC 6891), as far as it matters.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extension {
    pub(super) version: u8,
    dnssec_ok: bool,
}

/// Reads the records behind the question: whether there is an OPT record among them. `None` where
/// they can't be read.
pub(super) fn extension(query: &[u8], asked: &Asked<'_>) -> Option<Option<Extension>> {
    let [answers, authority, additional] = asked.header.records.map(usize::from);
    let (mut found, mut at) = (None, asked.question.end);
    for number in 0..answers + authority + additional {
        let record = dns::record(query, at)?;
        at = record.end;
        if record.kind != kind::OPT {
            continue;
        }
        // RFC 6891 6.1.1: at most one, of the root, in the additional section.
        if found.is_some() || !record.of_root || number < answers + authority {
            return None;
        }
        let [_, version, _, _] = record.ttl.to_be_bytes();
        found = Some(Extension {
            version,
            dnssec_ok: record.ttl & DNSSEC_OK != 0,
        });
    }
    Some(found)
}

/// "Format error": a header that copies what there is of the query's identifier and flags.
pub(super) fn form_error(query: &[u8]) -> Vec<u8> {
    let byte = |at: usize| query.get(at).copied().unwrap_or(0);
    let copied = byte(2) & (flags::OPCODE | flags::RECURSION_DESIRED);
    let mut answer = vec![
        byte(0),
        byte(1),
        flags::RESPONSE | copied,
        more_flags::RECURSION_AVAILABLE | FORM_ERROR,
    ];
    answer.resize(dns::HEADER, 0);
    answer
}

/// The start of a zone of ours, for which nobody else has a copy: only the last of its times, how
/// long it may be kept that something is not there (RFC 2308), is of use.
pub(super) fn start_of_authority() -> Vec<u8> {
    let mut data = GATEWAY.to_vec();
    data.extend(b"\x0ahostmaster\x07tapgate\x08internal\0");
    let [serial, refresh, retry, expire] = [1_u32, 3600, 600, 86_400];
    for number in [serial, refresh, retry, expire, TTL] {
        data.extend(number.to_be_bytes());
    }
    data
}

/// An answer on its way.
pub(super) struct Reply {
    header: Header,
    code: u8,
    answers: u16,
    /// Header, question and the records so far.
    bytes: Vec<u8>,
}

impl Reply {
    /// An answer without records.
    pub(super) fn new(header: Header, question: Question<'_>) -> Self {
        let mut bytes = vec![0; dns::HEADER];
        bytes.extend(question.name);
        bytes.extend(question.kind.to_be_bytes());
        bytes.extend(question.class.to_be_bytes());
        Self {
            header,
            code: 0,
            answers: 0,
            bytes,
        }
    }

    /// Adds a record of the name that was asked for.
    pub(super) fn answer(&mut self, kind: u16, data: &[u8]) {
        self.answers += 1;
        self.record(Owner::at(dns::HEADER), kind, data);
    }

    /// The name that was asked for does not exist.
    pub(super) fn does_not_exist(&mut self) {
        self.code = NAME_ERROR;
    }

    /// The answer; where it has no records it says for how long that may be kept.
    pub(super) fn finish(mut self, zone: Owner, extension: Option<Extension>) -> Vec<u8> {
        let authority = u16::from(self.answers == 0);
        if authority > 0 {
            self.record(zone, kind::SOA, &start_of_authority());
        }
        if let Some(extension) = extension {
            self.extend(extension, 0);
        }
        self.with_header(authority, u16::from(extension.is_some()))
    }

    /// The query's version of EDNS is not known here.
    pub(super) fn bad_version(mut self, extension: Option<Extension>) -> Vec<u8> {
        if let Some(extension) = extension {
            self.extend(extension, BAD_VERSION);
        }
        self.with_header(0, u16::from(extension.is_some()))
    }

    fn record(&mut self, Owner(owner): Owner, kind: u16, data: &[u8]) {
        let len = u16::try_from(data.len()).unwrap_or(0);
        self.bytes.extend(owner.to_be_bytes());
        self.bytes.extend(kind.to_be_bytes());
        self.bytes.extend(class::IN.to_be_bytes());
        self.bytes.extend(TTL.to_be_bytes());
        self.bytes.extend(len.to_be_bytes());
        self.bytes.extend(data);
    }

    /// Adds an OPT record of version 0, without options.
    fn extend(&mut self, extension: Extension, code: u32) {
        let dnssec_ok = if extension.dnssec_ok { DNSSEC_OK } else { 0 };
        self.bytes.push(0);
        self.bytes.extend(kind::OPT.to_be_bytes());
        self.bytes.extend(UDP_PAYLOAD.to_be_bytes());
        self.bytes.extend((code | dnssec_ok).to_be_bytes());
        self.bytes.extend([0, 0]);
    }

    /// Writes the header. The answer is from an authority (RFC 1035 4.1.1): nobody but us knows these
    /// names, so it is no copy out of a cache.
    fn with_header(mut self, authority: u16, additional: u16) -> Vec<u8> {
        let recursion_desired = self.header.flags & flags::RECURSION_DESIRED;
        let checking_disabled = self.header.more_flags & more_flags::CHECKING_DISABLED;
        let mut header = self.header.id.to_be_bytes().to_vec();
        header.extend([
            flags::RESPONSE | flags::AUTHORITATIVE | recursion_desired,
            more_flags::RECURSION_AVAILABLE | checking_disabled | self.code,
        ]);
        for count in [1, self.answers, authority, additional] {
            header.extend(count.to_be_bytes());
        }
        self.bytes.splice(..dns::HEADER, header);
        self.bytes
    }
}
