//! One network from its first descriptor to its last packet: the stages of set-up in their order, the
//! event loop, the end.
//!
//! Comes in: what a command line asks for. Goes out: an exit status. [`command`] is `tapgate run`,
//! [`attachment`] everything that exists already. No logic of its own beyond the order of things.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::sys::socket::SockType;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::buf::{LinkId, TxCapabilities};
use crate::cli::job::{self, Attachment, Edge, Names};
use crate::config::{Config, Dns};
use crate::control::lifecycle::{Attached, Line, Running};
use crate::control::signals::Signals;
use crate::control::{Command, api};
use crate::event_loop::{Ended, EventLoop};
use crate::host::kernel::{KernelHost, reaches_ipv6};
use crate::host::resolv_conf::Source;
use crate::host::resolv_text::{Asked, TextFile};
use crate::link::Link;
use crate::link::seqpacket::SeqpacketLink;
use crate::link::tap::TapLink;
use crate::net::Mac;
use crate::setup::attach::{Owner, Target};
use crate::setup::broker::{Broker, Errands};
use crate::setup::run::Job;
use crate::setup::sandbox::{self, Sandbox};
use crate::setup::{attach, socket_file};
use crate::stack::{LinkInfo, Stack};
use crate::sys::signals::SignalSource;
use crate::sys::{fd, memory, process};

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
}

fn runtime() -> Result<Runtime> {
    Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context("starting the runtime")
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
fn resolver(broker: Option<&mut Broker>) -> Result<Source> {
    Ok(match broker.and_then(Broker::take_resolver) {
        Some(socket) => Source::new(Asked::new(socket).context("asking for the resolvers")?),
        // The resolvers are fixed, or there are none: nobody will ask.
        None => Source::new(TextFile::new(RESOLV_CONF)),
    })
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

/// What a link says of itself.
type LinkTraits = (TxCapabilities, Option<Mac>);

fn tap_link(tap: OwnedFd) -> Result<(TapLink, LinkTraits)> {
    let link = TapLink::new(LinkId(0), tap).context("taking over the tap (is it an open tap?)")?;
    let traits = (link.granted().transmit(), Some(link.mac()));
    Ok((link, traits))
}

/// Everything that carries packets over a link, ready to run.
fn event_loop<L: Link>(
    plan: &Plan,
    (link, (capabilities, guest_mac)): (L, LinkTraits),
    (resolver, opener): (Source, Option<UnixStream>),
    commands: mpsc::Receiver<Command>,
) -> Result<EventLoop<L>> {
    if let Err(error) = memory::keep_pages_small() {
        tracing::debug!(%error, "huge pages as the system has them");
    }
    match process::raise_descriptor_limit() {
        Ok(limit) => tracing::debug!(limit, "descriptors"),
        Err(error) => tracing::warn!(%error, "the limit on descriptors stays low"),
    }
    let config = &plan.config;
    let mut host = KernelHost::new(config, resolver).context("opening the poller")?;
    if let Some(line) = opener {
        host.set_inside(line).context("watching the opener")?;
    }
    host.check_outbound()
        .with_context(|| outbound_step(plan.names.outbound, config))?;
    let info = LinkInfo {
        id: LinkId(0),
        capabilities,
        guest_mac,
    };
    let seed = memory::entropy().context("reading entropy")?;
    let mut stack = Stack::new(Arc::clone(config), info, seed);
    let (guest, mtu) = (config.plan.guest(), config.mtu);
    tracing::info!(%guest, mtu, ?capabilities, "network ready");
    for rule in &config.publish {
        stack.publish(&mut host, *rule).with_context(|| {
            format!(
                "--publish: listening at {} for guest port {}",
                rule.host,
                rule.guest.port()
            )
        })?;
    }
    Ok(EventLoop::new(
        link,
        host,
        stack,
        commands,
        config.busy_poll,
    ))
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

/// The last step before packets flow: from here on nothing can be opened.
fn enter_sandbox(plan: &Plan) -> Result<()> {
    sandbox::enter(plan.sandbox).context(plan.names.no_sandbox)?;
    #[cfg(debug_assertions)]
    crate::setup::escape::attempt();
    Ok(())
}

/// Runs the loop until `over` is, and the API beside it.
fn serve<L: Link, T: Send + 'static>(
    runtime: &Runtime,
    event_loop: EventLoop<L>,
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
            let addresses = plan.config.plan;
            control.spawn(async move {
                let served = api::serve(socket, commands, addresses).await;
                if let Err(error) = &served {
                    tracing::warn!(%error, "the API is not served");
                }
                served.map(|()| None)
            });
        }
        let ended = event_loop.run().await.context("carrying packets")?;
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
    job.tap.routes_ipv6 = reaches_ipv6();
    let errands = errands(&config, None, &inherited);
    let (mut broker, made) = Broker::start_command(&errands, &job)?;
    fd::close_inherited(&inherited);
    let plan = Plan {
        config: Arc::new(config),
        api: listen(Some(&broker), "--api-socket", api_socket, SockType::Stream)?,
        sandbox,
        names: job::TAPGATE,
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
    let outside = (resolver, made.opener);
    let event_loop = event_loop(&plan, tap_link(made.tap)?, outside, commands)?;
    enter_sandbox(&plan)?;
    running.line.begin().context("starting the command")?;
    let ended = serve(&runtime, event_loop, stop, plan, running.over())?;
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
    let signals = SignalSource::new().context("watching signals")?;
    job.config.search = search_list();
    if let Edge::Namespace { tap, .. } = &mut job.edge {
        tap.routes_ipv6 = reaches_ipv6();
    }
    let served = Served::open(&job)?;
    let ours = [&ready_fd, &exit_fd, &served.tap];
    let ours = ours.into_iter().flatten().map(AsRawFd::as_raw_fd);
    let line = served.opener.as_ref().map(AsRawFd::as_raw_fd);
    let ours: Vec<RawFd> = ours.chain(line).collect();
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
    if let Some(tap) = served.tap {
        let outside = (resolver, served.opener);
        serve_attached(&runtime, tap_link(tap)?, (plan, outside), attached, ready)
    } else if let Some(frames) = frames {
        let link = SeqpacketLink::new(LinkId(0), frames).context("taking over the socket")?;
        let link = (link, (TxCapabilities::default(), None));
        serve_attached(&runtime, link, (plan, (resolver, None)), attached, ready)
    } else {
        anyhow::bail!("there is nothing to exchange frames by")
    }
}

/// Each descriptor is taken over once.
fn refuse_twice(named: &[RawFd]) -> Result<()> {
    let mut sorted = named.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => anyhow::bail!("descriptor {} is named twice: pass different ones", pair[0]),
        None => Ok(()),
    }
}

fn adopt(option: &str, number: Option<RawFd>) -> Result<Option<OwnedFd>> {
    number
        .map(|number| {
            fd::adopt(number).with_context(|| format!("{option} {number}: pass an open descriptor"))
        })
        .transpose()
}

/// Where frames are to be exchanged, opened as far as that comes first.
#[derive(Default)]
struct Served {
    tap: Option<OwnedFd>,
    /// The line to whoever opens sockets inside.
    opener: Option<UnixStream>,
    /// A socket file to make.
    socket: Option<PathBuf>,
    /// What tells the end: a process, or the file of a namespace.
    process: Option<OwnedFd>,
    path: Option<PathBuf>,
}

impl Served {
    fn open(job: &Attachment) -> Result<Self> {
        let mut served = Self::default();
        let names = job.names;
        match &job.edge {
            Edge::Namespace {
                target,
                userns,
                tap,
            } => {
                match target {
                    Target::Process(pid) => {
                        let pidfd = process::pidfd(*pid)
                            .with_context(|| format!("{} {pid}: no such process", names.target))?;
                        served.process = Some(pidfd);
                    }
                    Target::Path(path) => served.path = Some(path.clone()),
                }
                let owner = Owner {
                    option: names.userns,
                    path: userns.as_deref(),
                };
                let made = attach::tap(target, owner, tap)?;
                (served.tap, served.opener) = (Some(made.tap), made.opener);
            }
            Edge::Tap(number) => {
                let tap = adopt("FD", Some(*number))?;
                served.tap = tap.map(attach::adopt_tap).transpose()?;
            }
            Edge::Socket(path) => served.socket = Some(path.clone()),
        }
        Ok(served)
    }
}

/// Who is told that the network works.
struct Ready(Option<OwnedFd>);

impl Ready {
    fn tell(self) -> Result<()> {
        match self.0 {
            Some(descriptor) => File::from(descriptor)
                .write_all(b"1")
                .context("--ready-fd: telling that the network works"),
            None => Ok(()),
        }
    }
}

fn serve_attached<L: Link>(
    runtime: &Runtime,
    link: (L, LinkTraits),
    (plan, outside): (Plan, (Source, Option<UnixStream>)),
    attached: Attached,
    ready: Ready,
) -> Result<u8> {
    let (stop, commands) = mpsc::channel(COMMANDS);
    let mut event_loop = event_loop(&plan, link, outside, commands)?;
    enter_sandbox(&plan)?;
    event_loop.begin().context("polling sockets")?;
    ready.tell()?;
    let over = serve(runtime, event_loop, stop, plan, attached.over())?;
    let reason = over.as_ref().map_or("link gone", |(reason, _)| reason);
    tracing::info!(reason, "over");
    Ok(0)
}
