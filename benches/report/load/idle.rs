//! Connections that are opened, echo a byte, and are then left alone.
//!
//! In: the server's ports, the size of a block, the time that opening may take, and the numbers to
//! stop at. Out: a line at each stop, with what each block of connections took to open so far. Then it
//! waits for a line on standard input before it goes on, so that the caller can look at the stack. After
//! the last stop every connection echoes once more, and a line says how many did. When [`DEAD`] did not,
//! the rest is not asked.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{connect, echo, nth_port, number, say};

/// Connections that may be found dead, each after a while of silence, before the others count as dead
/// too.
const DEAD: usize = 30;
const SILENCE: Duration = Duration::from_secs(1);

/// See the file's head; the arguments are those behind address and port.
pub(crate) fn hold(server: SocketAddr, arguments: &[String]) -> Result<()> {
    let mut opening = Opening {
        server,
        ports: number(arguments, 0)?,
        block: number(arguments, 1)?,
        left: Duration::from_secs_f64(number(arguments, 2)?),
        streams: Vec::new(),
        block_time: Duration::ZERO,
        rates: Vec::new(),
    };
    for place in 3..arguments.len() {
        let failed = opening.open(number(arguments, place)?).err();
        let opened = opening.streams.len();
        say(&json!({
            "opened": opened,
            "block_per_s": opening.rates,
            "failed": failed.as_ref().map(|error| format!("{error:#}")),
        }));
        io::stdin().read_line(&mut String::new())?;
        if failed.is_some() {
            break;
        }
    }
    let (mut alive, mut dead) = (0, 0);
    for stream in &mut opening.streams {
        stream.set_read_timeout(Some(SILENCE))?;
        match echo(stream) {
            Ok(()) => alive += 1,
            Err(_) => dead += 1,
        }
        if dead == DEAD {
            break;
        }
    }
    say(&json!({ "alive": alive }));
    Ok(())
}

struct Opening {
    server: SocketAddr,
    ports: u16,
    /// Connections whose rate is taken together.
    block: u32,
    /// Time that opening may still take.
    left: Duration,
    streams: Vec<TcpStream>,
    /// Time that the unfinished block took so far.
    block_time: Duration,
    /// Connections a second, of each full block.
    rates: Vec<f64>,
}

impl Opening {
    /// Goes on until so many are open.
    fn open(&mut self, count: usize) -> Result<()> {
        while self.streams.len() < count {
            let begin = Instant::now();
            let index = self.streams.len();
            let mut stream = connect(nth_port(self.server, self.ports, index))?;
            echo(&mut stream)?;
            self.streams.push(stream);
            let took = begin.elapsed();
            self.block_time += took;
            if self.streams.len().is_multiple_of(self.block.try_into()?) {
                let rate = f64::from(self.block) / self.block_time.as_secs_f64();
                self.rates.push(rate);
                self.block_time = Duration::ZERO;
            }
            self.left = self
                .left
                .checked_sub(took)
                .context("the time for opening is over")?;
        }
        Ok(())
    }
}
