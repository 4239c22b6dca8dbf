//! The load of the performance report: an echo server, a relay before it, and clients that measure against it.
//!
//! In: a mode and its numbers, by position, from `benches/report`, which is the only caller. Out: one
//! line of JSON for each result on standard output; a failure is one line on standard error and
//! status 1. A client measures what it sees itself; it knows nothing of the stack in between.
//!
//! ```text
//! load serve ADDRESS PORT PORTS                  TCP echo on PORTS ports from PORT, UDP echo on PORT;
//!                                                says "ready", ends when standard input does
//! load relay ADDRESS PORT SERVER PORTS ...       a relay from PORTS ports, from PORT on, to those from SERVER on;
//!                                                says "ready", ends when standard input does
//! load rr    ADDRESS PORT SECONDS                one byte there and back over TCP, again and again
//! load urr   ADDRESS PORT SECONDS                the same over UDP
//! load crr   ADDRESS PORT PORTS SECONDS          connect, one byte there and back, close
//! load many  ADDRESS PORT CONNECTIONS SECONDS    1 KiB there and back on each in turn
//! load pps   ADDRESS PORT SIZE SECONDS           datagrams as fast as they can be sent
//! load idle  ADDRESS PORT PORTS BLOCK SECONDS N...
//!                                                opens N connections at most, stopping at each N
//! ```
//!
//! A connection that is closed here keeps its port busy for a minute (TIME-WAIT), and one guest port
//! leads to a server port once at a time: hence several server ports, taken in turn.

#![allow(
    clippy::disallowed_methods,
    reason = "the bans on clocks and threads are for the core; a load generator measures time"
)]

mod idle;
mod relay;
mod serve;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

/// Longer than any answer takes that still comes.
const LOST: Duration = Duration::from_secs(10);
/// A datagram that has not come back by then does not.
const DATAGRAM_LOST: Duration = Duration::from_millis(500);
/// Round trips before the measured ones: addresses are looked up, code and buffers are warm.
const WARM: usize = 20;
/// Bytes of each operation of `many`.
const OPERATION: usize = 1024;
/// Datagrams between two looks at the clock.
const BURST: usize = 32;

fn main() -> Result<()> {
    // One descriptor a connection: as many as the caller allows.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [mode, rest @ ..] = arguments.as_slice() else {
        bail!("usage: load MODE ADDRESS PORT ... (the modes stand in benches/report/load/main.rs)");
    };
    match mode.as_str() {
        "serve" => serve::serve(at(rest)?, number(rest, 2)?),
        "relay" => relay::relay(number(rest, 0)?, &rest[1..]),
        "idle" => idle::hold(at(rest)?, &rest[2..]),
        timed => {
            say(&measure(timed, rest)?);
            Ok(())
        }
    }
}

/// The modes whose last argument is a time; gives what they measured.
fn measure(mode: &str, arguments: &[String]) -> Result<Value> {
    let server = at(arguments)?;
    let time = Duration::from_secs_f64(number(arguments, arguments.len() - 1)?);
    match mode {
        "rr" => round_trips(server, time),
        "urr" => datagram_round_trips(server, time),
        "crr" => connections(server, number(arguments, 2)?, time),
        "many" => many(server, number(arguments, 2)?, time),
        "pps" => flood(server, number(arguments, 2)?, time),
        unknown => bail!("no mode {unknown:?}"),
    }
}

/// Prints a result at once, also into a pipe.
fn say(result: &Value) {
    println!("{result}");
}

/// The number at a place of the arguments.
fn number<T: FromStr>(arguments: &[String], place: usize) -> Result<T> {
    let text = arguments
        .get(place)
        .with_context(|| format!("argument {place} after the mode is missing"))?;
    text.parse()
        .map_err(|_| anyhow!("argument {place} after the mode is no such number: {text:?}"))
}

/// The address and port that every mode begins with.
fn at(arguments: &[String]) -> Result<SocketAddr> {
    Ok(SocketAddr::new(
        number::<IpAddr>(arguments, 0)?,
        number(arguments, 1)?,
    ))
}

/// The server's port number `index`, counted round and round.
fn nth_port(server: SocketAddr, ports: u16, index: usize) -> SocketAddr {
    let offset = u16::try_from(index % usize::from(ports)).unwrap_or(0);
    SocketAddr::new(server.ip(), server.port() + offset)
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, LOST).context("connect")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(LOST))?;
    stream.set_write_timeout(Some(LOST))?;
    Ok(stream)
}

/// One byte there and back.
fn echo(stream: &mut TcpStream) -> Result<()> {
    let mut byte = [7];
    stream.write_all(&byte).context("write")?;
    stream.read_exact(&mut byte).context("read")?;
    Ok(())
}

fn round_trips(server: SocketAddr, time: Duration) -> Result<Value> {
    let mut stream = connect(server)?;
    let times = repeat(time, |_| echo(&mut stream))?;
    Ok(summary(&times))
}

fn datagram_round_trips(server: SocketAddr, time: Duration) -> Result<Value> {
    let socket = datagram_socket(server)?;
    let mut lost = 0_u64;
    let times = repeat(time, |_| {
        let mut byte = [7];
        socket.send(&byte)?;
        lost += u64::from(socket.recv(&mut byte).is_err());
        Ok(())
    })?;
    let mut result = summary(&times);
    result["lost"] = json!(lost);
    Ok(result)
}

fn connections(server: SocketAddr, ports: u16, time: Duration) -> Result<Value> {
    let times = repeat(time, |index| {
        echo(&mut connect(nth_port(server, ports, index))?)
    })?;
    Ok(summary(&times))
}

fn many(server: SocketAddr, connections: usize, time: Duration) -> Result<Value> {
    let mut streams = (0..connections)
        .map(|_| connect(server))
        .collect::<Result<Vec<_>>>()?;
    let mut bytes = [3; OPERATION];
    let (mut operations, start) = (0_u32, Instant::now());
    while start.elapsed() < time {
        for stream in &mut streams {
            stream.write_all(&bytes).context("write")?;
        }
        for stream in &mut streams {
            stream.read_exact(&mut bytes).context("read")?;
            operations += 1;
        }
    }
    let per_s = f64::from(operations) / start.elapsed().as_secs_f64();
    Ok(json!({ "per_s": per_s }))
}

/// Counts the datagrams that come back while others go out; what comes later does not count.
fn flood(server: SocketAddr, size: usize, time: Duration) -> Result<Value> {
    let socket = datagram_socket(server)?;
    let receiving = socket.try_clone()?;
    let start = Instant::now();
    let receiver = thread::spawn(move || {
        let (mut bytes, mut echoed) = ([0; 65536], 0_u32);
        while let Ok(length) = receiving.recv(&mut bytes) {
            echoed += u32::from(length == size && start.elapsed() < time);
        }
        echoed
    });
    let (bytes, mut sent) = (vec![1; size], 0_u32);
    while start.elapsed() < time {
        for _ in 0..BURST {
            // A full queue, or a complaint about an earlier one: lost like any other.
            sent += u32::from(socket.send(&bytes).is_ok());
        }
    }
    let echoed = receiver
        .join()
        .map_err(|_| anyhow!("the receiver failed"))?;
    let seconds = time.as_secs_f64();
    let (sent, echoed) = (f64::from(sent) / seconds, f64::from(echoed) / seconds);
    Ok(json!({ "sent_per_s": sent, "echoed_per_s": echoed }))
}

fn datagram_socket(server: SocketAddr) -> Result<UdpSocket> {
    let any = if server.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(DATAGRAM_LOST))?;
    Ok(socket)
}

/// Does something again and again; gives how long each took, in microseconds, sorted.
fn repeat(time: Duration, mut action: impl FnMut(usize) -> Result<()>) -> Result<Vec<f64>> {
    for index in 0..WARM {
        action(index)?;
    }
    let (start, mut times) = (Instant::now(), Vec::new());
    while start.elapsed() < time {
        let begin = Instant::now();
        action(WARM + times.len())?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// How many a second, and how long half and 99 of 100 took at most.
fn summary(sorted: &[f64]) -> Value {
    let total: f64 = sorted.iter().sum();
    let count = u32::try_from(sorted.len()).unwrap_or(u32::MAX);
    let at = |percent: usize| sorted.get(sorted.len().saturating_sub(1) * percent / 100);
    json!({ "per_s": f64::from(count) / (total / 1e6), "p50_us": at(50), "p99_us": at(99) })
}
