//! The parser of `resolv.conf`: no text panics, and what it gives is bounded and whole.

use tapgate::host::resolv_conf;

/// Tries an input.
pub fn run(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let conf = resolv_conf::parse(&text);
    assert!(conf.resolvers.len() <= 8, "bounded");
    assert!(conf.search.len() <= 32, "bounded");
    for resolver in &conf.resolvers {
        assert_eq!(resolver.port(), 53, "the port of names");
        assert!(text.contains("nameserver"), "somebody named {resolver}");
    }
    for domain in &conf.search {
        assert!(text.contains(domain.as_str()), "taken as it stands");
        let one = !domain.contains(|c: char| c.is_ascii_whitespace());
        assert!(one, "one word: {domain:?}");
    }
}
