//! One network from its first descriptor to its last packet: the stages of set-up in their order, the
//! event loop, the end.
//!
//! Comes in: what a command line asks for. Goes out: an exit status. [`command`] is `tapgate run`,
//! [`attachment`] everything that exists already. No logic of its own beyond the order of things.

mod edge;

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::sys::socket::SockType;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::buf::{LinkId, TxCapabilities};
use crate::carrier::Carrier;
use crate::cli::job::{self, Attachment, Edge, Names};
use crate::config::{Config, Dns};
use crate::control::lifecycle::{Attached, Line, Running};
use crate::control::signals::Signals;
use crate::control::{Command, api};
use crate::event_loop::{Ended, EventLoop, Incoming};
use crate::flow::key::KeyedState;
use crate::handover::Handover;
use crate::host::kernel::{KernelHost, reaches_ipv6};
use crate::host::resolv_conf::Source;
use crate::host::resolv_text::{Asked, TextFile};
use crate::lending::Lending;
use crate::link::Link;
use crate::link::seqpacket::SeqpacketLink;
use crate::link::tap::{TapFilter, TapLink};
use crate::log;
use crate::net::Mac;
use crate::preemption::Preemption;
use crate::setup::broker::{Broker, Errands};
use crate::setup::run::Job;
use crate::setup::sandbox::{self, Sandbox};
use crate::setup::socket_file;
use crate::stack::share::Place;
use crate::stack::{LinkInfo, Stack};
use crate::sys::reserve::Reserve;
use crate::sys::signals::SignalSource;
use crate::sys::{fd, memory, process};
use crate::workers::{Crew, runtime};
use edge::{Ready, Served, adopt, refuse_twice};

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Commands that may wait for the loop.
const COMMANDS: usize = 16;

/// The search list of the host at this moment.
#[must_use]
pub fn search_list() -> Vec<String> {
    Source::new(TextFile::new(RESOLV_CONF))
        .known()
        .search
        .clone()
}

/// What carries packets beside the link, and how the process protects itself before the first.
struct Plan {
    config: Arc<Config>,
    api: Option<OwnedFd>,
    sandbox: Sandbox,
    names: Names,
    reserve: Reserve,
}

/// What the broker does for every network.
fn errands<'a>(config: &Config, namespace: Option<&'a Path>, named: &'a [RawFd]) -> Errands<'a> {
    Errands {
        resolv_conf: (config.dns == Dns::Host).then_some(Path::new(RESOLV_CONF)),
        namespace,
        not_for_broker: named,
    }
}

/// Where the resolvers come from, once no file can be read any more.
fn resolver(broker: Option<&mut Broker>) -> Result<Option<Source>> {
    let socket = broker.and_then(Broker::take_resolver);
    let source = socket.map(|socket| Asked::new(socket).map(Source::new));
    source.transpose().context("asking for the resolvers")
}

/// Listens at a path, where there is one, which the broker is to remove.
fn listen(
    broker: Option<&Broker>,
    option: &str,
    path: Option<&Path>,
    kind: SockType,
) -> Result<Option<OwnedFd>> {
    let (Some(path), Some(broker)) = (path, broker) else {
        return Ok(None);
    };
    let socket = socket_file::listen(option, path, kind)?;
    broker.remove_at_end(path).context(option.to_owned())?;
    Ok(Some(socket))
}

/// Lets this process have as many descriptors as it may, but for those that are kept for the API.
fn descriptors() -> Result<Reserve> {
    let (now, most) = process::descriptor_limits().context("reading the limit on descriptors")?;
    tracing::debug!(most, "descriptors");
    let reserve = Reserve::begin(most).or_else(|error| {
        tracing::warn!(%error, "the limit on descriptors stays low");
        Reserve::begin(now)
    });
    reserve.context("setting the limit on descriptors")
}

/// What a link says of itself.
type LinkTraits = (TxCapabilities, Option<Mac>);

/// The link over one queue of a tap, of those that share the filter of the tap.
fn tap_link(tap: OwnedFd, queue: usize, filter: &TapFilter) -> Result<(TapLink, LinkTraits)> {
    let mut link =
        TapLink::new(LinkId(0), tap).context("taking over the tap (is it an open tap?)")?;
    link.thin_floods(filter.clone(), queue);
    let traits = (link.granted().transmit(), Some(link.mac()));
    Ok((link, traits))
}

/// What one worker needs beside its link.
struct Part {
    place: Place,
    /// The first asks for the resolvers.
    resolver: Option<Source>,
    opener: Option<UnixStream>,
    incoming: Incoming,
}

/// The parts of so many workers; commands are for the first.
fn parts(
    count: usize,
    commands: mpsc::Receiver<Command>,
    resolver: Option<Source>,
    openers: Vec<UnixStream>,
) -> Result<Vec<Part>> {
    let [_, _, one, other] = memory::entropy().context("reading entropy")?;
    let hash = KeyedState::new((one, other));
    let (mut first, mut openers) = (Some((commands, resolver)), openers.into_iter());
    let handovers = Handover::between(count).into_iter().enumerate();
    let parts = handovers.map(|(index, handover)| {
        let (commands, resolver) = first.take().unwrap_or_else(|| (never(), None));
        Part {
            place: Place { index, count, hash },
            resolver,
            opener: openers.next(),
            incoming: Incoming { commands, handover },
        }
    });
    Ok(parts.collect())
}

/// Commands that never come.
fn never() -> mpsc::Receiver<Command> {
    let (sender, commands) = mpsc::channel(1);
    // The loop would end with its last sender.
    std::mem::forget(sender);
    commands
}

/// Everything that carries packets over a link, ready to run.
fn event_loop<L: Link>(
    (config, reserve): (&Arc<Config>, Reserve),
    (link, (capabilities, guest_mac)): (L, LinkTraits),
    part: Part,
) -> Result<EventLoop<L>> {
    let host = KernelHost::new(Arc::clone(config), part.resolver, reserve, part.place.count);
    let mut host = host.context("opening the poller")?;
    if let Some(line) = part.opener {
        host.set_inside(line).context("watching the opener")?;
    }
    let info = LinkInfo {
        id: LinkId(0),
        capabilities,
        guest_mac,
    };
    let seed = memory::entropy().context("reading entropy")?;
    let stack = Stack::worker(Arc::clone(config), info, seed, part.place);
    Ok(EventLoop::new(link, host, stack, part.incoming))
}

/// The first worker's loop, which listens at the published ports.
fn first_loop<L: Link>(plan: &Plan, link: (L, LinkTraits), part: Part) -> Result<EventLoop<L>> {
    if let Err(error) = memory::keep_pages_small() {
        tracing::debug!(%error, "huge pages as the system has them");
    }
    let config = &plan.config;
    let (guest, mtu, workers) = (config.plan.guest(), config.mtu, part.place.count);
    let (capabilities, _) = link.1;
    let mut event_loop = event_loop((config, plan.reserve), link, part)?;
    event_loop
        .check_outbound()
        .with_context(|| outbound_step(plan.names.outbound, config))?;
    tracing::info!(%guest, mtu, workers, ?capabilities, "network ready");
    for rule in &config.publish {
        event_loop.publish(*rule).with_context(|| {
            format!(
                "--publish: listening at {} for guest port {}",
                rule.host,
                rule.guest.port()
            )
        })?;
    }
    Ok(event_loop)
}

fn outbound_step(option: &str, config: &Config) -> String {
    let all = [&config.outbound, &config.outbound6].into_iter().flatten();
    let mut all: Vec<String> = all.map(ToString::to_string).collect();
    all.dedup();
    format!(
        "{option} {} (name an address or interface of this host)",
        all.join(" or ")
    )
}

/// The loops of all workers: the first one's, and one over each of the other queues of the tap.
fn all_loops(plan: &Plan, taps: Vec<OwnedFd>, parts: Vec<Part>) -> Result<Vec<EventLoop<TapLink>>> {
    let filter = TapFilter::of(taps.len());
    let mut queues = taps.into_iter().zip(parts).enumerate();
    let (queue, (tap, part)) = queues.next().context("the tap has no queue")?;
    let first = first_loop(plan, tap_link(tap, queue, &filter)?, part)?;
    let others = queues.map(|(queue, (tap, part))| {
        let link = tap_link(tap, queue, &filter)?;
        event_loop((&plan.config, plan.reserve), link, part)
    });
    std::iter::once(Ok(first)).chain(others).collect()
}

/// The last step before packets flow: from here on nothing can be opened. Gives the first thread's part, which carries
/// all loops for now, and the threads that may carry the others, which start on the way.
fn enter_sandbox<L: Link + Send + 'static>(
    plan: &Plan,
    loops: Vec<EventLoop<L>>,
) -> Result<(Carrier<L>, Crew)> {
    let (sandbox, option, busy_poll) = (plan.sandbox, plan.names.no_sandbox, plan.config.busy_poll);
    // Everybody who shares standard error has started by now, and files can still be opened.
    log::detach();
    sandbox::confine(sandbox).context(option)?;
    let preemption = Preemption::of_this_thread();
    let crew = Crew::default();
    let mut lendings = Lending::between(loops.len()).into_iter();
    let first = lendings.next().context("there is no worker")?;
    for (index, lending) in (1..).zip(lendings) {
        let carrier = Carrier::new(Vec::new(), lending, busy_poll, preemption);
        crew.start(format!("tapgate-{index}"), carrier)?;
    }
    sandbox::filter(sandbox).context(option)?;
    #[cfg(debug_assertions)]
    crate::setup::escape::attempt();
    Ok((Carrier::new(loops, first, busy_poll, preemption), crew))
}

/// Carries packets until `over` is, and serves the API beside it.
fn serve<L: Link, T: Send + 'static>(
    runtime: &Runtime,
    (carrier, mut crew): (Carrier<L>, Crew),
    commands: mpsc::Sender<Command>,
    plan: Plan,
    over: impl Future<Output = std::io::Result<T>> + Send + 'static,
) -> Result<Option<T>> {
    runtime.block_on(async {
        let mut control = JoinSet::new();
        let stop = commands.clone();
        let over = control.spawn(async move {
            let over = over.await;
            // The loop may have ended by itself; then nobody listens.
            let _ = stop.send(Command::Stop).await;
            over.map(Some)
        });
        if let Some(socket) = plan.api {
            let (addresses, reserve) = (plan.config.plan, plan.reserve);
            control.spawn(async move {
                let served = api::serve(socket, commands, (addresses, reserve)).await;
                if let Err(error) = &served {
                    tracing::warn!(%error, "the API is not served");
                }
                served.map(|()| None)
            });
        }
        let ended = tokio::select! {
            ended = carrier.run() => ended,
            ended = crew.ended() => ended,
        };
        let ended = ended.context("carrying packets")?;
        tracing::info!(?ended, "network ended");
        if ended == Ended::LinkGone {
            return Ok(None);
        }
        while let Some(done) = control.join_next_with_id().await {
            match done {
                Ok((id, done)) if id == over.id() => return Ok(done?),
                Ok((_, done)) => drop(done),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    })
}

/// Runs a command in a network of its own; gives its exit status.
///
/// # Errors
/// The step that failed; nothing is left of it.
pub fn command(
    config: Config,
    mut job: Job,
    api_socket: Option<&Path>,
    sandbox: Sandbox,
) -> Result<u8> {
    // What the caller left open is for the command.
    let inherited = fd::inherited().context("looking at /proc/self/fd (is /proc mounted?)")?;
    // From now on a signal waits until somebody can act on it.
    let signals = SignalSource::new().context("watching signals")?;
    job.tap.routes_ipv6 = reaches_ipv6().unwrap_or(true);
    let errands = errands(&config, None, &inherited);
    let (mut broker, made) = Broker::start_command(&errands, &job)?;
    fd::close_inherited(&inherited);
    let plan = Plan {
        config: Arc::new(config),
        api: listen(Some(&broker), "--api-socket", api_socket, SockType::Stream)?,
        sandbox,
        names: job::TAPGATE,
        reserve: descriptors()?,
    };
    broker.seal().context("speaking to the broker")?;
    let resolver = resolver(Some(&mut broker))?;
    let runtime = runtime()?;
    let _inside = runtime.enter();
    let (stop, commands) = mpsc::channel(COMMANDS);
    let running = Running {
        signals: Signals::new(signals)?,
        line: Line::new(broker)?,
    };
    let parts = parts(made.taps.len(), commands, resolver, made.opener)?;
    let loops = all_loops(&plan, made.taps, parts)?;
    let carriers = enter_sandbox(&plan, loops)?;
    running.line.begin().context("starting the command")?;
    let ended = serve(&runtime, carriers, stop, plan, running.over())?;
    let (status, _line) = ended.context("the tap inside was taken away")?;
    Ok(status)
}

/// Gives a network to something that exists, until that or the caller says that it is over.
///
/// # Errors
/// The step that failed; nothing is left of it.
pub fn attachment(mut job: Attachment) -> Result<u8> {
    let named = job.descriptors();
    refuse_twice(&named)?;
    fd::close_all_but(&named).context("closing what the caller left open")?;
    let ready_fd = adopt("--ready-fd", job.ready_fd)?;
    if let Some(descriptor) = &ready_fd
        && !fd::is_writable(descriptor.as_fd())
    {
        anyhow::bail!("--ready-fd: not open for writing: pass the writing end of a pipe");
    }
    let exit_fd = adopt("--exit-fd", job.exit_fd)?;
    // From now on a signal waits until somebody can act on it.
    let signals = SignalSource::but_ignored().context("watching signals")?;
    job.config.search = search_list();
    if let Edge::Namespace { tap, .. } = &mut job.edge {
        tap.routes_ipv6 = reaches_ipv6().unwrap_or(true);
    }
    let served = Served::open(&job)?;
    let ours = [&ready_fd, &exit_fd].into_iter().flatten();
    let ours = ours.chain(&served.taps).map(AsRawFd::as_raw_fd);
    let lines = served.openers.iter().map(AsRawFd::as_raw_fd);
    let ours: Vec<RawFd> = ours.chain(lines).collect();
    let errands = errands(&job.config, served.path.as_deref(), &ours);
    let sockets = job.api_socket.is_some() || served.socket.is_some();
    let mut broker = (sockets || !errands.are_none())
        .then(|| Broker::start(&errands))
        .transpose()?;
    let (frames, api) = (served.socket.as_deref(), job.api_socket.as_deref());
    let frames = listen(
        broker.as_ref(),
        "--target-type=bess",
        frames,
        SockType::SeqPacket,
    )?;
    let plan = Plan {
        api: listen(broker.as_ref(), "--api-socket", api, SockType::Stream)?,
        config: Arc::new(job.config),
        sandbox: job.sandbox,
        names: job.names,
        reserve: descriptors()?,
    };
    let resolver = resolver(broker.as_mut())?;
    if let Some(broker) = &broker {
        broker.seal().context("speaking to the broker")?;
    }
    let runtime = runtime()?;
    let _inside = runtime.enter();
    let attached = Attached {
        signals: Signals::new(signals)?,
        process: served.process,
        line: broker.map(Line::new).transpose()?,
        exit_fd,
    };
    let ready = Ready(ready_fd);
    let (stop, commands) = mpsc::channel(COMMANDS);
    let parts = parts(served.taps.len().max(1), commands, resolver, served.openers)?;
    if !served.taps.is_empty() {
        let loops = all_loops(&plan, served.taps, parts)?;
        let carriers = enter_sandbox(&plan, loops)?;
        serve_attached(&runtime, carriers, (plan, stop), attached, ready)
    } else if let Some(frames) = frames {
        let part = parts.into_iter().next().context("there is no worker")?;
        let link = SeqpacketLink::new(LinkId(0), frames).context("taking over the socket")?;
        let link = (link, (TxCapabilities::default(), None));
        let loops = vec![first_loop(&plan, link, part)?];
        let carriers = enter_sandbox(&plan, loops)?;
        serve_attached(&runtime, carriers, (plan, stop), attached, ready)
    } else {
        anyhow::bail!("there is nothing to exchange frames by")
    }
}

fn serve_attached<L: Link>(
    runtime: &Runtime,
    (mut carrier, crew): (Carrier<L>, Crew),
    (plan, stop): (Plan, mpsc::Sender<Command>),
    attached: Attached,
    ready: Ready,
) -> Result<u8> {
    carrier.begin().context("polling sockets")?;
    ready.tell()?;
    let over = serve(runtime, (carrier, crew), stop, plan, attached.over())?;
    let reason = over.as_ref().map_or("link gone", |(reason, _)| reason);
    tracing::info!(reason, "over");
    Ok(0)
}
