//! A client on the host's loopback that is joined to a socket inside, past the link; or that goes over the
//! link after all, when that fails.

use tapgate::host::simulated::{Call, ConnectAnswer, SocketId};

use crate::Script;
use crate::lab::{addr, filled, secs};
use crate::sim::Sim;
use crate::world::{NEIGHBOUR, TCP_PORT, TCP_SERVICE, World};

/// Bytes each way: more than the host's buffers and a pipe hold.
const TOTAL: usize = 9000;

/// One of the two ends: sends all it has, then its end; takes what comes.
struct End {
    id: SocketId,
    sent: usize,
    shut: bool,
    came: Vec<u8>,
}

impl End {
    fn new(id: SocketId) -> Self {
        Self {
            id,
            sent: 0,
            shut: false,
            came: Vec::new(),
        }
    }

    fn act(&mut self, sim: &Sim, waits: bool) {
        self.came.extend(sim.net.server_read(self.id, usize::MAX));
        let all = filled(TOTAL);
        self.sent += sim.net.server_write(self.id, &all[self.sent..]);
        let ready = self.sent == TOTAL && (!waits || sim.net.server_sees_end(self.id));
        if ready && !self.shut {
            self.shut = true;
            sim.net.server_shutdown(self.id);
        }
    }

    fn has_failed(&self, sim: &Sim) -> bool {
        sim.net.is_broken(self.id) || sim.net.server_sees_reset(self.id)
    }

    fn is_over(&self, sim: &Sim) -> bool {
        self.has_failed(sim) || (self.shut && sim.net.server_sees_end(self.id))
    }
}

/// Whoever is connected to inside, over whichever way.
fn live(world: &mut World) {
    let sim = &mut world.lab.0;
    let service = addr(TCP_SERVICE);
    sim.net.answer(service, ConnectAnswer::Accept);
    let before = sim.net.connections().len();
    let listener = sim.listen(80);
    let Some(client) = sim.net.client_connect(addr(TCP_PORT), addr(NEIGHBOUR)) else {
        return;
    };
    let mut ends = vec![End::new(client)];
    let began = sim.clock.now();
    sim.run(secs(300), |sim| {
        if sim.clock.now() > began + secs(60) {
            sim.net.heal();
        }
        for id in sim.net.connections().into_iter().skip(before) {
            if id != client && !sim.net.is_closed(id) && ends.iter().all(|end| end.id != id) {
                ends.push(End::new(id));
            }
        }
        for (nth, end) in ends.iter_mut().enumerate() {
            end.act(sim, nth == 0);
        }
        sim.wake = (sim.clock.now() < began + secs(61)).then_some(began + secs(61));
        ends.len() == 2 && ends.iter().all(|end| end.is_over(sim))
    });
    sim.wake = None;
    // An attempt that failed, and was followed by another.
    ends.retain(|end| end.id == client || !end.came.is_empty() || !sim.net.is_broken(end.id));
    let [client, insides @ ..] = &ends[..] else {
        return;
    };
    let all = filled(TOTAL);
    assert!(insides.len() <= 1, "one connection inside");
    for end in &ends {
        assert!(all.starts_with(&end.came), "bytes out of place");
    }
    for (reader, writer) in insides.iter().flat_map(|it| [(client, it), (it, client)]) {
        let ended = sim.net.server_sees_end(reader.id) && !sim.net.is_broken(reader.id);
        let in_order = writer.shut && reader.came.len() == TOTAL;
        // Who has heard nothing may see a connection go that never was one.
        assert!(
            !ended || in_order || reader.came.is_empty(),
            "an end too soon"
        );
        assert!(
            !writer.has_failed(sim) || reader.is_over(sim),
            "{:?} missed that {:?} is gone",
            reader.id,
            writer.id
        );
    }
    let whole = |end: &End| end.is_over(sim) && !end.has_failed(sim) && end.came.len() == TOTAL;
    world.complete = ends.len() == 2 && ends.iter().all(whole);
    // Over the link a guest without manners is still there; it goes, and so does the client.
    sim.socket(listener).abort();
    for id in sim.net.connections().into_iter().skip(before) {
        sim.net.server_reset(id);
    }
    world.heal();
    world.lab.wait(secs(5));
}

#[test]
fn client_past_the_link() {
    Script {
        name: "past the link",
        world: World::published,
        live,
        calls: &[
            Call::Accept,
            Call::OpenPipe,
            Call::ConnectInside,
            Call::Outcome,
            Call::WatchTcp,
            Call::Fill,
            Call::Drain,
            Call::Shutdown,
        ],
    }
    .fails_everywhere();
}

#[test]
fn client_of_a_server_on_the_namespaces_loopback() {
    Script {
        name: "past the link, to the loopback",
        world: World::published,
        live: |world| {
            world.lab.0.net.answer(
                addr(TCP_SERVICE),
                ConnectAnswer::FailLater(libc::ECONNREFUSED),
            );
            let sim = &mut world.lab.0;
            let client = sim.net.client_connect(addr(TCP_PORT), addr(NEIGHBOUR));
            let client = client.unwrap();
            let inside = |sim: &Sim| {
                let mut all = sim.net.connections().into_iter();
                all.rfind(|id| sim.net.remote(*id) == Some(addr("127.0.0.1:80")))
            };
            let mut came = Vec::new();
            sim.run(secs(90), |sim| {
                let Some(inside) = inside(sim) else {
                    return sim.net.server_sees_reset(client);
                };
                if sim.net.server_unread(inside) == 0 && came.is_empty() {
                    let _ = sim.net.server_write(client, b"hello");
                }
                came.extend(sim.net.server_read(inside, usize::MAX));
                !came.is_empty() || sim.net.server_sees_reset(client)
            });
            world.complete = came.starts_with(b"hello");
            sim.net.server_reset(client);
            if let Some(inside) = inside(sim) {
                sim.net.server_reset(inside);
            }
            world.heal();
            world.lab.wait(secs(5));
        },
        calls: &[
            Call::ConnectInside,
            Call::Outcome,
            Call::WatchTcp,
            Call::Fill,
            Call::Drain,
        ],
    }
    .fails_everywhere();
}
