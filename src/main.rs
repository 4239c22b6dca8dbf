//! The program: command line, set-up, event loop, exit status. No logic of its own.
//!
//! Exit status: that of the command for `run`; 0 when `attach` ends as it should; 1 with one line
//! on standard error when something can't be done; 2 for a wrong command line.

use std::env;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::Parser;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

use tapgate::buf::LinkId;
use tapgate::cli::options::{LogFormat, Options};
use tapgate::cli::{Attach, Cli, Command, Run};
use tapgate::config::{Config, Dns};
use tapgate::control::lifecycle::{self, Attached, Running};
use tapgate::control::signals::Signals;
use tapgate::event_loop::EventLoop;
use tapgate::host::kernel::KernelHost;
use tapgate::host::resolv_conf::Source;
use tapgate::link::tap::TapLink;
use tapgate::setup::guest::TapPlan;
use tapgate::setup::{attach, keeper, resolv_conf, run};
use tapgate::stack::{LinkInfo, Stack};
use tapgate::sys::signals::SignalSource;
use tapgate::sys::{fd, memory, process};

const RESOLV_CONF: &str = "/etc/resolv.conf";

fn main() -> ExitCode {
    let cli = Cli::parse();
    memory::map_large_allocations();
    let done = match cli.command {
        Command::Run(args) => run_command(args),
        Command::Attach(args) => attach_to(&args),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("tapgate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start_logging(options: &Options) {
    let level = match options.verbose {
        0 => tracing::Level::WARN,
        1 => tracing::Level::INFO,
        2 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    let lines = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr);
    match options.log_format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().init(),
    }
}

fn runtime() -> Result<Runtime> {
    Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context("starting the runtime")
}

/// Everything that carries packets, ready to run.
fn event_loop(
    config: &Arc<Config>,
    tap: OwnedFd,
    resolvers: Source,
    commands: mpsc::Receiver<tapgate::control::Command>,
) -> Result<EventLoop<TapLink>> {
    if let Err(error) = memory::keep_pages_small() {
        tracing::debug!(%error, "huge pages as the system has them");
    }
    match process::raise_descriptor_limit() {
        Ok(limit) => tracing::debug!(limit, "descriptors"),
        Err(error) => tracing::warn!(%error, "the limit on descriptors stays low"),
    }
    let link = TapLink::new(LinkId(0), tap).context("taking over the tap")?;
    let mut host = KernelHost::new(config, resolvers).context("opening the poller")?;
    let info = LinkInfo {
        id: LinkId(0),
        capabilities: link.granted().transmit(),
        guest_mac: Some(link.mac()),
    };
    let mut stack = Stack::new(
        Arc::clone(config),
        info,
        memory::entropy().context("reading entropy")?,
    );
    let (guest, mtu) = (config.plan.guest(), config.mtu);
    tracing::info!(%guest, mtu, granted = ?link.granted(), "network ready");
    for rule in &config.publish {
        stack.publish(&mut host, *rule).with_context(|| {
            format!(
                "--publish: listening at {} for guest port {}",
                rule.host,
                rule.guest.port()
            )
        })?;
    }
    Ok(EventLoop::new(link, host, stack, commands))
}

/// Runs the loop until `over` is.
fn serve<T: Send + 'static>(
    runtime: &Runtime,
    event_loop: EventLoop<TapLink>,
    stop: mpsc::Sender<tapgate::control::Command>,
    over: impl Future<Output = std::io::Result<T>> + Send + 'static,
) -> Result<Option<T>> {
    runtime.block_on(async {
        let over = async move {
            let over = over.await;
            // The loop may have ended by itself; then nobody listens.
            let _ = stop.send(tapgate::control::Command::Stop).await;
            over
        };
        #[expect(
            clippy::disallowed_methods,
            reason = "control runs beside the data path, not on it"
        )]
        let control = tokio::spawn(over);
        let ended = event_loop.run().await.context("carrying packets")?;
        tracing::info!(?ended, "network ended");
        match ended {
            tapgate::event_loop::Ended::Stopped => Ok(Some(control.await??)),
            tapgate::event_loop::Ended::LinkGone => Ok(None),
        }
    })
}

fn run_command(args: Run) -> Result<u8> {
    start_logging(&args.options);
    let mut resolvers = Source::new(RESOLV_CONF);
    let config = Arc::new(args.options.config(resolvers.current().search.clone()));
    let resolv_conf = (config.dns != Dns::Off)
        .then(|| resolv_conf::text(config.plan.resolver().into(), &config.search));
    let job = run::Job {
        command: command_line(args.command)?,
        mapping: args.map,
        tap: TapPlan::new(&config, &args.ifname, args.options.mac.map(|mac| mac.0)),
        resolv_conf,
    };
    let (started, tap) = run::start(&job)?;
    let finished = run_started(&config, resolvers, started, tap);
    keeper::end_descendants();
    finished
}

fn run_started(
    config: &Arc<Config>,
    resolvers: Source,
    started: run::Started,
    tap: OwnedFd,
) -> Result<u8> {
    let signals = SignalSource::new().context("watching signals")?;
    let runtime = runtime()?;
    let _inside = runtime.enter();
    let (stop, commands) = mpsc::channel(1);
    let event_loop = event_loop(config, tap, resolvers, commands)?;
    let running = Running {
        signals: Signals::new(signals)?,
        keeper: started.keeper,
    };
    let _keep = started.begin().context("starting the command")?;
    let status = serve(&runtime, event_loop, stop, running.over())?;
    status.context("the tap inside was taken away")
}

/// The command's words, or the caller's shell.
fn command_line(words: Vec<OsString>) -> Result<Vec<CString>> {
    let words = if words.is_empty() {
        vec![
            env::var_os("SHELL")
                .filter(|shell| !shell.is_empty())
                .unwrap_or_else(|| "/bin/sh".into()),
        ]
    } else {
        words
    };
    words
        .into_iter()
        .map(|word| CString::new(word.into_vec()).context("COMMAND: a word holds a zero byte"))
        .collect()
}

fn attach_to(args: &Attach) -> Result<u8> {
    start_logging(&args.options);
    let adopt = |option: &str, number: Option<i32>| {
        number
            .map(|number| {
                fd::adopt(number)
                    .with_context(|| format!("{option} {number}: pass an open descriptor above 2"))
            })
            .transpose()
    };
    if args.ready_fd.is_some() && args.ready_fd == args.exit_fd {
        anyhow::bail!("--ready-fd and --exit-fd name the same descriptor: pass two");
    }
    let ready_fd = adopt("--ready-fd", args.ready_fd)?;
    let exit_fd = adopt("--exit-fd", args.exit_fd)?;
    let mut resolvers = Source::new(RESOLV_CONF);
    let config = Arc::new(args.options.config(resolvers.current().search.clone()));
    let plan = TapPlan::new(&config, args.interface(), args.options.mac.map(|mac| mac.0));
    let target = attach::Target::parse(&args.target);
    let watched = watch(&target)?;
    let tap = attach::tap(&target, args.userns.as_deref(), &plan)?;
    let signals = SignalSource::new().context("watching signals")?;
    let runtime = runtime()?;
    let _inside = runtime.enter();
    let (stop, commands) = mpsc::channel(1);
    let event_loop = event_loop(&config, tap, resolvers, commands)?;
    let attached = Attached {
        signals: Signals::new(signals)?,
        target: watched,
        exit_fd,
    };
    if let Some(ready_fd) = ready_fd {
        File::from(ready_fd)
            .write_all(b"1")
            .context("--ready-fd: telling that the network works")?;
    }
    let reason = serve(&runtime, event_loop, stop, attached.over())?;
    tracing::info!(reason = reason.unwrap_or("tap gone"), "over");
    Ok(0)
}

/// What tells the end of the target.
fn watch(target: &attach::Target) -> Result<lifecycle::Target> {
    match target {
        attach::Target::Process(pid) => {
            let pidfd =
                process::pidfd(*pid).with_context(|| format!("TARGET {pid}: no such process"))?;
            Ok(lifecycle::Target::Process(pidfd))
        }
        attach::Target::Path(path) => lifecycle::Target::path(path.clone())
            .with_context(|| format!("TARGET {}: opening the namespace", path.display())),
    }
}
