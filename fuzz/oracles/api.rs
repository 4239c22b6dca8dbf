//! The requests of the API: no bytes panic, and what is understood makes sense.

use tapgate::config::AddressPlan;
use tapgate::control::api::hostfwd::{MAX_REQUEST, Parsed, Request, parse, refusal};

/// Tries an input.
pub fn run(bytes: &[u8]) {
    let plan = AddressPlan::default();
    match parse(bytes, &plan) {
        Parsed::Whole(Ok(Request::Add(rule))) => {
            assert_ne!(rule.host.port(), 0, "a port to listen at");
            assert_ne!(rule.guest.port(), 0, "a port to lead to");
            assert!(plan.is_guest_side(rule.guest.ip()), "only to the guest");
        }
        Parsed::Whole(Ok(Request::List | Request::Remove(_))) => {}
        Parsed::Whole(Err(refused)) => {
            assert!(refusal(&refused).starts_with("{\"error\":{\"desc\":\"bad request: "));
        }
        Parsed::Partial => assert!(bytes.len() <= MAX_REQUEST, "bounded"),
    }
}
