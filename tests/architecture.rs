//! Holds the rules of the house that the compiler does not: which room may name which, where
//! `unsafe`, clocks, descriptors and smoltcp's TCP may appear, how long a file may be, and that the
//! documents name files that exist.
//!
//! In: the text of `src/`, `tests/`, `doc/*.md` and `README.md`. Out: one failing test per broken
//! rule, with file and line. It reads text, not types: a small tokenizer drops comments and
//! literals, and every path is followed through the file's own `use` lines. Code under
//! `#[cfg(test)]` may name what it likes. Each rule is shown to bite in the module `samples`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// The level table, lowest first: a room, and the rooms that it may name beside itself.
const ROOMS: &[(&str, &[&str])] = &[
    ("sys", &[]),
    ("buf", &["sys"]),
    ("config", &[]),
    ("log", &[]),
    ("net", &["buf"]),
    ("host", &["sys", "buf", "net", "config"]),
    ("link", &["sys", "buf", "net", "config"]),
    ("flow", &["net", "buf", "host", "config"]),
    ("stack", &["flow", "net", "buf", "host", "config"]),
    ("setup", &["sys", "config", "link", "host", "log"]),
    ("control", &["setup", "config", "sys"]),
    ("busy_poll", &[]),
    ("preemption", &["sys"]),
    ("handover", &["stack", "host", "buf"]),
    (
        "event_loop",
        &[
            "stack",
            "link",
            "host",
            "control",
            "buf",
            "config",
            "handover",
            "preemption",
        ],
    ),
    ("lending", &[]),
    (
        "carrier",
        &[
            "event_loop",
            "link",
            "control",
            "busy_poll",
            "lending",
            "preemption",
        ],
    ),
    ("workers", &["carrier", "event_loop", "link"]),
    ("cli", EVERYTHING),
    ("session", EVERYTHING),
    ("main", EVERYTHING),
    ("lib", EVERYTHING),
];

/// Stands for every room in [`ROOMS`].
const EVERYTHING: &[&str] = &["*"];

/// Rooms without side effects. Of `host` they see its traits and plain types, never an
/// implementation, so that a simulated host can stand in for the kernel.
const CORE: &[&str] = &["net", "flow", "stack"];

/// What the core must not name, as a path or the start of one.
const IMPURE_PATHS: &[&str] = &[
    "tokio",
    "nix",
    "libc",
    "socket2",
    "std::os",
    "std::thread",
    "std::env",
    "std::fs",
    "std::net::TcpStream",
    "std::net::TcpListener",
    "std::net::UdpSocket",
    "std::time::SystemTime",
];

/// What the core must not name, wherever it comes from.
const IMPURE_WORDS: &[&str] = &["OwnedFd", "RawFd", "BorrowedFd", "SystemTime"];

const MAX_FILE_LINES: usize = 600;
const MAX_FUNCTION_LINES: usize = 80;

// --- the rules, on the tree ----------------------------------------------------------------------

#[test]
fn rooms_name_only_the_rooms_below_them() -> io::Result<()> {
    hold("src", levels)
}

#[test]
fn core_names_no_runtime_descriptor_clock_thread_or_environment() -> io::Result<()> {
    hold("src", purity)
}

#[test]
fn unsafe_stays_in_sys() -> io::Result<()> {
    hold("src", unsafe_place)
}

#[test]
fn every_unsafe_block_is_explained() -> io::Result<()> {
    hold("src", unsafe_explained)
}

#[test]
fn only_flow_tcp_names_the_tcp_engine() -> io::Result<()> {
    hold("src", tcp_engine_place)
}

#[test]
fn every_file_opens_with_what_it_owns() -> io::Result<()> {
    hold("src", file_head)
}

#[test]
fn no_file_is_too_long() -> io::Result<()> {
    hold("src", file_length)
}

#[test]
fn no_function_is_too_long() -> io::Result<()> {
    hold("src", function_length)
}

#[test]
fn nothing_is_left_unfinished() -> io::Result<()> {
    hold("src", unfinished)?;
    hold("tests", unfinished)
}

#[test]
fn documents_name_files_that_exist() -> io::Result<()> {
    let root = root();
    let mut documents = files_below(&root.join("doc"), "md")?;
    documents.push(root.join("README.md"));
    let exists = |path: &str| root.join(path).is_file() || root.join("src").join(path).is_file();
    let mut lines = Vec::new();
    for document in documents {
        let found = match fs::read_to_string(&document) {
            Ok(text) => document_paths(&text, &exists),
            Err(error) => vec![(1, error.to_string())],
        };
        lines.extend(report(&relative(&document), found));
    }
    assert!(lines.is_empty(), "\n{}", lines.join("\n"));
    Ok(())
}

#[test]
fn documents_name_tests_that_exist() -> io::Result<()> {
    let exists = |file: &str, name: &str| {
        let declared = format!("fn {name}(");
        let places = [
            format!("tests/{file}.rs"),
            format!("tests/{file}"),
            format!("{file}.rs"),
        ];
        places.iter().any(|place| {
            let place = root().join(place);
            let files = if place.is_dir() {
                files_below(&place, "rs").unwrap_or_default()
            } else {
                vec![place]
            };
            let texts = files
                .iter()
                .filter_map(|file| fs::read_to_string(file).ok());
            texts.into_iter().any(|text| text.contains(&declared))
        })
    };
    let mut lines = Vec::new();
    for path in ["doc/conformance.md", "doc/faults.md", "doc/security.md"] {
        let text = fs::read_to_string(root().join(path))?;
        lines.extend(report(path, document_tests(&text, &exists)));
    }
    assert!(lines.is_empty(), "\n{}", lines.join("\n"));
    Ok(())
}

/// What a checker found in one file: line and message.
type Found = Vec<(usize, String)>;
type Check = fn(&Source) -> Found;

/// Runs one checker over a folder's sources and fails with everything that it found.
fn hold(folder: &str, check: Check) -> io::Result<()> {
    let sources = read_tree(folder)?;
    assert!(
        !sources.is_empty(),
        "no file in {folder}/ was read: the rule would hold of nothing"
    );
    let found = |source: &Source| report(&source.path, check(source));
    let lines: Vec<String> = sources.iter().flat_map(found).collect();
    assert!(lines.is_empty(), "\n{}", lines.join("\n"));
    Ok(())
}

fn report(path: &str, found: Found) -> Vec<String> {
    let message = |(line, what)| format!("{path}:{line}: {what}");
    found.into_iter().map(message).collect()
}

// --- the checkers --------------------------------------------------------------------------------

/// Tests that a document names as `file::name` and that do not exist.
fn document_tests(text: &str, exists: &dyn Fn(&str, &str) -> bool) -> Found {
    let mut found = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for span in line.split('`').skip(1).step_by(2) {
            let Some((file, name)) = span.split_once("::") else {
                continue;
            };
            if name != "name" && !exists(file, name) {
                found.push((number + 1, format!("no test `{span}`")));
            }
        }
    }
    found
}

fn levels(source: &Source) -> Found {
    let room = source.room();
    let Some((_, allowed)) = ROOMS.iter().find(|(name, _)| *name == room) else {
        let what = format!("`{room}` is no room of the level table in this test");
        return vec![(1, what)];
    };
    let mut found = Vec::new();
    for Name { line, path } in source.names.iter().filter(|name| name.path[0] == "crate") {
        let whole = path.join("::");
        let named = path.get(1).map_or("lib", String::as_str);
        let known = ROOMS.iter().any(|(name, _)| *name == named);
        let target = if known { named } else { "lib" };
        if target != room && !allowed.contains(&target) && *allowed != EVERYTHING {
            let what = format!("may not name `{target}` (`{whole}`)");
            found.push((*line, format!("`{room}` {what}")));
        }
        let item = path.get(2).and_then(|item| item.chars().next());
        if target == "host" && CORE.contains(&room) && item.is_some_and(|c| !c.is_uppercase()) {
            let what = "may name only the traits and types directly in `host`";
            found.push((*line, format!("`{room}` {what} (`{whole}`)")));
        }
    }
    found
}

fn purity(source: &Source) -> Found {
    if !CORE.contains(&source.room()) {
        return Vec::new();
    }
    let mut found = Vec::new();
    for Name { line, path } in &source.names {
        let reads_clock = path.ends_with(&["Instant".to_owned(), "now".to_owned()]);
        let reaches_out = IMPURE_PATHS.iter().any(|&bad| reaches(path, bad));
        if reads_clock || reaches_out {
            let whole = path.join("::");
            found.push((*line, format!("the core may not name `{whole}`")));
        }
    }
    for Token { line, text } in &source.code {
        if IMPURE_WORDS.contains(&text.as_str()) {
            found.push((*line, format!("the core may not name `{text}`")));
        }
    }
    found
}

fn unsafe_place(source: &Source) -> Found {
    if source.room() == "sys" {
        return Vec::new();
    }
    let mut found = Vec::new();
    for Token { line, .. } in source.tokens.iter().filter(|token| token.text == "unsafe") {
        found.push((*line, "`unsafe` belongs below src/sys".to_owned()));
    }
    found
}

/// A `SAFETY:` comment counts in the three lines above, or anywhere in the comment that stands
/// directly above.
fn unsafe_explained(source: &Source) -> Found {
    let lines: Vec<&str> = source.text.lines().collect();
    let explains = |line: &&str| line.contains("//") && line.contains("SAFETY:");
    let mut found = Vec::new();
    for pair in source.tokens.windows(2) {
        if pair[0].text != "unsafe" || !["{", "impl"].contains(&pair[1].text.as_str()) {
            continue;
        }
        let above = || lines[..pair[0].line - 1].iter().rev();
        let comment = above().take_while(|line| line.trim_start().starts_with("//"));
        if !above().take(3).chain(comment).any(explains) {
            let what = "`unsafe` without a `SAFETY:` comment above";
            found.push((pair[0].line, what.to_owned()));
        }
    }
    found
}

fn tcp_engine_place(source: &Source) -> Found {
    if source.path.starts_with("src/flow/tcp") {
        return Vec::new();
    }
    let mut found = Vec::new();
    for Name { line, path } in &source.names {
        if reaches(path, "smoltcp::socket::tcp") || reaches(path, "smoltcp::iface") {
            let whole = path.join("::");
            found.push((*line, format!("only src/flow/tcp* may name `{whole}`")));
        }
    }
    found
}

fn file_head(source: &Source) -> Found {
    let lines = source.text.lines();
    let head = lines.take_while(|line| line.starts_with("//!"));
    if head.filter(|line| line.trim() != "//!").count() >= 2 {
        return Vec::new();
    }
    let what = "no `//!` head of two lines or more (what it owns, what comes in, what goes out)";
    vec![(1, what.to_owned())]
}

fn file_length(source: &Source) -> Found {
    let lines = source.text.lines().count();
    if lines <= MAX_FILE_LINES {
        return Vec::new();
    }
    let what = format!("{lines} lines, {MAX_FILE_LINES} are the limit");
    vec![(lines, what)]
}

fn function_length(source: &Source) -> Found {
    let tokens = &source.tokens;
    let mut found = Vec::new();
    for start in (0..tokens.len()).filter(|&at| tokens[at].text == "fn") {
        let Some(body) = body_start(tokens, start) else {
            continue;
        };
        let first = tokens[start].line;
        let end = matching(tokens, body).min(tokens.len() - 1);
        let lines = tokens[end].line - first + 1;
        if lines > MAX_FUNCTION_LINES {
            let name = &tokens[start + 1].text;
            let what = format!("`{name}` has {lines} lines, {MAX_FUNCTION_LINES} are the limit");
            found.push((first, what));
        }
    }
    found
}

fn unfinished(source: &Source) -> Found {
    let tokens = &source.tokens;
    let mut found = Vec::new();
    for (at, Token { line, text }) in tokens.iter().enumerate() {
        let next = tokens.get(at + 1).map_or("", |next| next.text.as_str());
        if next == "!" && ["todo", "unimplemented", "dbg"].contains(&text.as_str()) {
            found.push((*line, format!("`{text}!` is left in the code")));
        }
        if text == "#" && next == "[" {
            let attribute = &tokens[at..matching(tokens, at + 1).min(tokens.len())];
            if attribute.iter().any(|token| token.text == "ignore") {
                found.push((*line, "an ignored test is no test".to_owned()));
            }
        }
    }
    found
}

/// Finds every backticked `some/file.rs` for which `exists` says no.
fn document_paths(text: &str, exists: &dyn Fn(&str) -> bool) -> Found {
    let mut found = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for quoted in line.split('`').skip(1).step_by(2) {
            let extension = Path::new(quoted).extension();
            let plain = quoted.contains('/') && !quoted.contains(['*', '{', '<', ' ']);
            if plain && extension.is_some_and(|it| it == "rs") && !exists(quoted) {
                found.push((index + 1, format!("no file `{quoted}`")));
            }
        }
    }
    found
}

/// Whether `path` names `forbidden`, something inside it, or everything beside it (`*`).
fn reaches(path: &[String], forbidden: &str) -> bool {
    let forbidden: Vec<&str> = forbidden.split("::").collect();
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    path.starts_with(&forbidden)
        || matches!(path.split_last(), Some((&"*", outer)) if forbidden.starts_with(outer))
}

// --- sources -------------------------------------------------------------------------------------

/// One file, read once.
struct Source {
    /// Below the crate, as in `src/flow/tcp.rs`.
    path: String,
    text: String,
    /// The whole file without comments and literals.
    tokens: Vec<Token>,
    /// The same without what is under `#[cfg(test)]`.
    code: Vec<Token>,
    /// Every path in `code`, followed through the file's `use` lines.
    names: Vec<Name>,
}

/// A path as it is named in one place: `["crate", "flow", "Key"]`, `["std", "fs", "*"]`.
struct Name {
    line: usize,
    path: Vec<String>,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        let tokens = tokenize(text);
        let code = without_tests(&tokens);
        let names = names_in(&code, &module_of(path));
        Self {
            path: path.to_owned(),
            text: text.to_owned(),
            tokens,
            code,
            names,
        }
    }

    /// The first path component below `src`: `flow` for `src/flow/tcp.rs`.
    fn room(&self) -> &str {
        let inner = self.path.strip_prefix("src/").unwrap_or(&self.path);
        let first = inner.split('/').next().unwrap_or(inner);
        first.strip_suffix(".rs").unwrap_or(first)
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn relative(path: &Path) -> String {
    let inner = path.strip_prefix(root()).unwrap_or(path);
    inner.display().to_string()
}

/// All Rust files below a folder of the crate. A file that is somewhere declared as
/// `#[cfg(test)] mod name;` counts as test code as a whole.
fn read_tree(folder: &str) -> io::Result<Vec<Source>> {
    let mut sources = Vec::new();
    for path in files_below(&root().join(folder), "rs")? {
        sources.push(Source::new(&relative(&path), &fs::read_to_string(&path)?));
    }
    let test_modules: Vec<Vec<String>> = sources.iter().flat_map(test_modules).collect();
    for source in &mut sources {
        let module = module_of(&source.path);
        if test_modules.iter().any(|test| module.starts_with(test)) {
            source.code.clear();
            source.names.clear();
        }
    }
    Ok(sources)
}

/// The files below a folder with this extension, sorted; none where there is no folder.
fn files_below(folder: &Path, extension: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if !folder.is_dir() {
        return Ok(found);
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files_below(&path, extension)?);
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// `src/flow/tcp.rs` is `["flow", "tcp"]`, `src/flow/mod.rs` is `["flow"]`, `src/lib.rs` is `[]`.
fn module_of(path: &str) -> Vec<String> {
    let inner = path.strip_prefix("src/").unwrap_or(path);
    let inner = inner.strip_suffix(".rs").unwrap_or(inner);
    let mut module: Vec<String> = inner.split('/').map(str::to_owned).collect();
    if module.last().is_some_and(|last| last == "mod") || inner == "lib" || inner == "main" {
        module.pop();
    }
    module
}

// --- tokens --------------------------------------------------------------------------------------

/// A word, `::`, or one other character that is no space.
#[derive(Clone, Debug, PartialEq)]
struct Token {
    line: usize,
    text: String,
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn tokenize(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let (mut tokens, mut line, mut at) = (Vec::new(), 1, 0);
    while at < chars.len() {
        let hidden = hidden_end(&chars, at);
        let end = hidden.unwrap_or_else(|| token_end(&chars, at));
        let end = end.min(chars.len());
        if hidden.is_none() && !chars[at].is_whitespace() {
            let text = chars[at..end].iter().collect();
            tokens.push(Token { line, text });
        }
        line += chars[at..end].iter().filter(|&&c| c == '\n').count();
        at = end;
    }
    tokens
}

fn token_end(chars: &[char], at: usize) -> usize {
    match chars[at] {
        ':' if chars.get(at + 1) == Some(&':') => at + 2,
        c if is_word(c) => at + chars[at..].iter().take_while(|&&c| is_word(c)).count(),
        _ => at + 1,
    }
}

/// The end of the comment or literal that starts here, if one does. The `b` or `c` in front of a
/// literal that is not raw is left as a word of its own.
fn hidden_end(chars: &[char], at: usize) -> Option<usize> {
    let rest = &chars[at..];
    match rest {
        ['/', '/', ..] => Some(at + rest.iter().take_while(|&&c| c != '\n').count()),
        ['/', '*', ..] => Some(at + block_comment_length(rest)),
        ['"', ..] => Some(at + string_length(rest)),
        ['\'', '\\', _, tail @ ..] => {
            Some(at + 4 + tail.iter().take_while(|&&c| c != '\'').count())
        }
        ['\'', _, '\'', ..] => Some(at + 3),
        ['r', ..] | ['b' | 'c', 'r', ..] => raw_string_length(rest).map(|length| at + length),
        _ => None,
    }
}

fn block_comment_length(chars: &[char]) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < chars.len() {
        match &chars[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn string_length(chars: &[char]) -> usize {
    let mut at = 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// The length of `r"..."`, `r#"..."#` and so on, with a `b` or `c` in front or not.
fn raw_string_length(chars: &[char]) -> Option<usize> {
    let prefix = if chars[0] == 'r' { 1 } else { 2 };
    let hashes = chars[prefix..].iter().take_while(|&&c| c == '#').count();
    let body = prefix + hashes + 1;
    if chars.get(body - 1) != Some(&'"') {
        return None;
    }
    let closes = |tail: &[char]| tail[0] == '"' && tail[1..].iter().all(|&c| c == '#');
    let length = chars[body..].windows(1 + hashes).position(closes)?;
    Some(body + length + 1 + hashes)
}

/// The index of the bracket that closes the one at `open`; the number of tokens if none does.
fn matching(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0_usize;
    for (at, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at;
        }
    }
    tokens.len()
}

/// The `{` of the function whose `fn` is here; none for a function pointer or a bare signature.
fn body_start(tokens: &[Token], start: usize) -> Option<usize> {
    let mut at = start + 1;
    tokens.get(at).filter(|token| token.text != "(")?;
    loop {
        match tokens.get(at)?.text.as_str() {
            "{" => return Some(at),
            ";" | "}" => return None,
            "(" | "[" => at = matching(tokens, at) + 1,
            _ => at += 1,
        }
    }
}

fn texts_at(tokens: &[Token], at: usize, texts: &[&str]) -> bool {
    let found = tokens[at..].iter().map(|token| token.text.as_str());
    found.take(texts.len()).eq(texts.iter().copied())
}

fn is_test_attribute(tokens: &[Token], at: usize) -> bool {
    texts_at(tokens, at, &["#", "[", "cfg", "(", "test", ")"])
        || texts_at(tokens, at, &["#", "[", "cfg", "(", "all", "(", "test", ","])
}

/// The end of the item, with its attributes, that starts here.
fn item_end(tokens: &[Token], start: usize) -> usize {
    let mut at = start;
    while let Some(token) = tokens.get(at) {
        match token.text.as_str() {
            "{" => return (matching(tokens, at) + 1).min(tokens.len()),
            ";" => return at + 1,
            "}" => return at,
            "(" | "[" => at = matching(tokens, at) + 1,
            _ => at += 1,
        }
    }
    tokens.len()
}

fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let (mut code, mut at) = (Vec::new(), 0);
    while at < tokens.len() {
        if texts_at(tokens, at, &["#", "!", "[", "cfg", "(", "test", ")"]) {
            return code;
        } else if is_test_attribute(tokens, at) {
            at = item_end(tokens, at);
        } else {
            code.push(tokens[at].clone());
            at += 1;
        }
    }
    code
}

/// The modules that this file declares as `#[cfg(test)] mod name;`.
fn test_modules(source: &Source) -> Vec<Vec<String>> {
    let tokens = &source.tokens;
    let mut found = Vec::new();
    for at in (0..tokens.len()).filter(|&at| is_test_attribute(tokens, at)) {
        if let [.., keyword, name, end] = &tokens[at..item_end(tokens, at)]
            && (keyword.text.as_str(), end.text.as_str()) == ("mod", ";")
        {
            let mut module = module_of(&source.path);
            module.push(name.text.clone());
            found.push(module);
        }
    }
    found
}

// --- names ---------------------------------------------------------------------------------------

/// One path as it is written: a leaf of a `use` tree, or a path in the code.
#[derive(Clone, Default)]
struct Leaf {
    line: usize,
    path: Vec<String>,
    alias: Option<String>,
    in_use: bool,
}

/// Every path of two parts or more, and every `use`, as seen from the crate's root.
fn names_in(code: &[Token], file_module: &[String]) -> Vec<Name> {
    let inline = inline_modules(code);
    let (mut leaves, mut at) = (Vec::new(), 0);
    while at < code.len() {
        if !starts_path(code, at) {
            at += 1;
            continue;
        }
        let mut module = file_module.to_vec();
        for (name, _, _) in inline
            .iter()
            .filter(|(_, start, end)| *start < at && at < *end)
        {
            module.push(name.clone());
        }
        let in_use = in_use(code, at);
        let outer = Leaf {
            in_use,
            ..Leaf::default()
        };
        let mut found = Vec::new();
        at = read_path(code, at, &outer, &mut found);
        for leaf in &mut found {
            leaf.path = from_root(&leaf.path, &module);
        }
        leaves.append(&mut found);
    }
    let mut imports = HashMap::new();
    for leaf in leaves.iter().filter(|leaf| leaf.in_use) {
        if let Some(binding) = leaf.alias.as_ref().or(leaf.path.last()) {
            imports.insert(binding.clone(), leaf.path.clone());
        }
    }
    let mut names = Vec::new();
    for Leaf { line, path, .. } in leaves {
        let path = follow(path, &imports);
        names.push(Name { line, path });
    }
    names
}

/// Whether a path of two parts or more, or a `use` tree, begins here.
fn starts_path(code: &[Token], at: usize) -> bool {
    let text = |at: usize| code.get(at).map_or("", |token| token.text.as_str());
    let word = |at: usize| text(at).chars().all(is_word);
    let continues = at >= 2
        && text(at - 1) == "::"
        && text(at - 2) != "use"
        && (word(at - 2) || text(at - 2) == ">");
    let head = word(at) && text(at) != "use" && !continues;
    head && (text(at + 1) == "::" || in_use(code, at)) || text(at) == "{" && in_use(code, at)
}

/// Whether the path that begins here is the whole of a `use`.
fn in_use(code: &[Token], at: usize) -> bool {
    let before = code[..at].iter().rev().find(|token| token.text != "::");
    before.is_some_and(|token| token.text == "use")
}

/// Reads a path or a `use` tree, which goes on from `outer`, into its leaves and gives the index
/// behind it.
fn read_path(code: &[Token], start: usize, outer: &Leaf, out: &mut Vec<Leaf>) -> usize {
    let text = |at: usize| code.get(at).map_or("", |token| token.text.as_str());
    let mut at = start;
    if text(at) == "{" {
        let end = matching(code, at);
        at += 1;
        while at < end {
            let comma = text(at) == ",";
            at = if comma {
                at + 1
            } else {
                read_path(code, at, outer, out)
            };
        }
        return end + 1;
    }
    let mut leaf = outer.clone();
    leaf.line = code[at].line;
    leaf.path.push(text(at).to_owned());
    at += 1;
    let next = text(at + 1);
    if text(at) == "::" && (next == "{" || next == "*" || next.starts_with(is_word)) {
        return read_path(code, at + 1, &leaf, out);
    }
    if leaf.in_use && text(at) == "as" {
        leaf.alias = Some(text(at + 1).to_owned());
        at += 2;
    }
    out.push(leaf);
    at
}

/// The `mod name { ... }` of a file: name, first and last token.
fn inline_modules(code: &[Token]) -> Vec<(String, usize, usize)> {
    let mut found = Vec::new();
    for at in 0..code.len().saturating_sub(2) {
        if code[at].text == "mod" && code[at + 2].text == "{" {
            found.push((code[at + 1].text.clone(), at, matching(code, at + 2)));
        }
    }
    found
}

/// Resolves `crate`, `self` and `super`; other paths stay as they are.
fn from_root(path: &[String], module: &[String]) -> Vec<String> {
    let mut resolved = match path[0].as_str() {
        "crate" | "tapgate" => vec!["crate".to_owned()],
        "self" | "super" => {
            let mut here = vec!["crate".to_owned()];
            here.extend_from_slice(module);
            here
        }
        _ => Vec::new(),
    };
    let skipped = usize::from(["crate", "tapgate"].contains(&path[0].as_str()));
    for part in &path[skipped..] {
        match part.as_str() {
            "self" => {}
            "super" => drop(resolved.pop()),
            _ => resolved.push(part.clone()),
        }
    }
    if resolved.is_empty() {
        vec!["crate".to_owned()]
    } else {
        resolved
    }
}

/// Replaces a first part that the file imports by what it stands for, a few times over: an import
/// may lean on another.
fn follow(mut path: Vec<String>, imports: &HashMap<String, Vec<String>>) -> Vec<String> {
    for _ in 0..4 {
        match imports.get(&path[0]) {
            Some(import) if import[0] != path[0] => {
                path = import.iter().chain(&path[1..]).cloned().collect();
            }
            _ => break,
        }
    }
    path
}

// --- every checker finds what it is there for ----------------------------------------------------

/// Each sample is a line `path | text`, with `\n` for a new line in the text.
mod samples {
    use super::*;

    fn judge(check: Check, samples: &str, expected: bool) {
        for line in samples.lines().filter(|line| !line.trim().is_empty()) {
            let sample = line.split_once(" | ");
            assert!(sample.is_some(), "not `path | text`: {line}");
            let (path, text) = sample.unwrap_or_default();
            let found = check(&Source::new(path.trim(), &text.replace("\\n", "\n")));
            assert_eq!(!found.is_empty(), expected, "{line}: {found:?}");
        }
    }

    fn bites(check: Check, samples: &str) {
        judge(check, samples, true);
    }

    fn passes(check: Check, samples: &str) {
        judge(check, samples, false);
    }

    #[test]
    fn the_table_looks_down_only() {
        for (level, (room, allowed)) in ROOMS.iter().enumerate() {
            for below in allowed.iter().filter(|_| *allowed != EVERYTHING) {
                let found = ROOMS.iter().position(|(name, _)| name == below);
                assert!(
                    found.is_some_and(|found| found < level),
                    "{room} names {below}"
                );
            }
        }
    }

    #[test]
    fn levels_see_every_way_to_name_a_room() {
        let samples = r"
            src/flow/udp.rs | use crate::stack::Policy;
            src/flow/udp.rs | use crate::{net, stack::{self, Policy}};
            src/flow/udp.rs | use crate::{net::{Key, Packet}, buf::Batch as B, link};
            src/flow/udp.rs | use {crate::net, crate::stack};
            src/flow/mod.rs | use super::stack;
            src/flow/tcp/ring.rs | use super::super::super::stack;
            src/flow/udp.rs | fn f() { let _ = crate::stack::Policy::new(); }
            src/flow/udp.rs | fn f(_: Vec<crate::stack::Policy>) {}
            src/flow/udp.rs | use tapgate::stack::Policy;
            src/flow/udp.rs | #[cfg(test)] mod tests { fn f() {} }\nuse crate::stack::Policy;
            src/config.rs | mod inner { use super::super::buf; }
            src/config.rs | use crate::Everything;
            src/config.rs | use super::*;
            src/helpers.rs | use crate::config::Config;";
        bites(levels, samples);
    }

    #[test]
    fn levels_let_the_allowed_pass() {
        let samples = r#"
            src/flow/udp.rs | use crate::{net, buf::Batch};\nuse super::{table, Key};
            src/flow/mod.rs | mod inner { use super::Key; use super::super::net; }
            src/flow/udp.rs | // crate::stack\nconst S: &str = "crate::stack::X";
            src/flow/udp.rs | #[cfg(test)]\nmod tests { use crate::stack::Policy; }
            src/flow/udp.rs | #[cfg(test)]\nuse crate::stack::{A, B};\nfn f() {}
            src/main.rs | use tapgate::{cli, event_loop};"#;
        passes(levels, samples);
    }

    #[test]
    fn the_core_sees_only_the_traits_of_host() {
        let samples = r"
            src/flow/udp.rs | use crate::host::kernel::Socket;
            src/stack/mod.rs | use crate::host::{Host, simulated};
            src/stack/mod.rs | use crate::host::*;
            src/flow/udp.rs | use crate::host;\nfn f(_: host::kernel::Socket) {}
            src/flow/udp.rs | use crate::host as h;\nfn f(_: h::kernel::Socket) {}";
        bites(levels, samples);
        let samples = r"
            src/flow/udp.rs | use crate::host::{self, Host, Token};\nfn f(_: host::Event) {}
            src/event_loop.rs | use crate::host::kernel::Socket;";
        passes(levels, samples);
    }

    #[test]
    fn purity_sees_each_forbidden_name() {
        for path in IMPURE_PATHS {
            bites(purity, &format!("src/net/mod.rs | use {path};"));
            bites(
                purity,
                &format!("src/flow/udp.rs | fn f() {{ {path}::x(); }}"),
            );
            passes(purity, &format!("src/host/kernel.rs | use {path};"));
        }
        for word in IMPURE_WORDS {
            bites(purity, &format!("src/stack/dns.rs | fn f(_: {word}) {{}}"));
        }
        let samples = r"
            src/stack/mod.rs | use std::time::Instant;\nfn f() { Instant::now(); }
            src/stack/mod.rs | use std::time::Instant as I;\nfn f() { I::now(); }
            src/stack/mod.rs | use std::net;\nfn f(_: net::TcpStream) {}
            src/stack/mod.rs | use std::{fmt, net::{IpAddr, UdpSocket}};
            src/stack/mod.rs | use std::net::*;
            src/stack/mod.rs | fn f() -> u8 { 1 as libc::c_char }
            src/stack/mod.rs | fn f() -> u8 { X::Y as libc::c_char }
            src/stack/mod.rs | fn f() { g(::std::fs::read) }";
        bites(purity, samples);
        let samples = r"
            src/stack/mod.rs | use std::net::IpAddr;\nuse std::time::{Duration, Instant};
            src/stack/mod.rs | //! [`tokio::spawn`]\nfn f(now: Instant) {}";
        passes(purity, samples);
    }

    #[test]
    fn unsafe_is_found_as_a_word_only() {
        let samples = r"
            src/link/tap.rs | fn f() { unsafe { g() } }
            src/system.rs | unsafe impl Send for X {}";
        bites(unsafe_place, samples);
        let samples = r##"
            src/sys/tap.rs | fn f() { unsafe { g() } }
            src/lib.rs | #![deny(unsafe_code, unsafe_op_in_unsafe_fn)]
            src/lib.rs | /* unsafe { } /* unsafe */ unsafe */ const S: &str = r#"unsafe " x"#;"##;
        passes(unsafe_place, samples);
    }

    #[test]
    fn unsafe_needs_its_comment() {
        let samples = r#"
            src/sys/tap.rs | fn f() {\n    unsafe { g() }\n}
            src/sys/tap.rs | // SAFETY: too far away.\n\n\n\nunsafe impl Send for X {}
            src/sys/tap.rs | const S: &str = "SAFETY:";\nunsafe impl Send for X {}"#;
        bites(unsafe_explained, samples);
        let samples = r"
            src/sys/tap.rs | // SAFETY: the descriptor is open.\nlet x = unsafe { g() };
            src/sys/tap.rs | // SAFETY: a\n// b\n// c\n// d\nunsafe impl Send for X {}
            src/sys/tap.rs | unsafe fn f() {}";
        passes(unsafe_explained, samples);
    }

    #[test]
    fn the_tcp_engine_has_one_home() {
        let samples = r"
            src/flow/udp.rs | use smoltcp::{iface::Interface, wire};
            src/stack/mod.rs | use smoltcp::socket;\nfn f(_: socket::tcp::Socket) {}";
        bites(tcp_engine_place, samples);
        let samples = r"
            src/flow/tcp.rs | use smoltcp::{iface::Interface, socket::tcp};
            src/flow/tcp/device.rs | use smoltcp::socket::tcp;
            src/net/mod.rs | use smoltcp::wire::Ipv4Packet;";
        passes(tcp_engine_place, samples);
    }

    #[test]
    fn heads_and_lengths_are_counted() {
        let samples = r"
            src/a.rs | //! One line.\nfn f() {}
            src/a.rs | //! One line.\n//!\nfn f() {}
            src/a.rs | fn f() {}\n//! Late.\n//! Later.";
        bites(file_head, samples);
        passes(
            file_head,
            r"src/a.rs | //! What it owns.\n//! What goes in and out.",
        );
        let file = |lines: usize| format!("src/a.rs | {}", r"\n".repeat(lines));
        bites(file_length, &file(MAX_FILE_LINES + 1));
        passes(file_length, &file(MAX_FILE_LINES));
        let body = |lines: usize| format!("{{{}}}", r"\n".repeat(lines - 1));
        let function = |lines| format!("src/a.rs | fn f(a: [u8; 2]) {}", body(lines));
        bites(function_length, &function(MAX_FUNCTION_LINES + 1));
        passes(function_length, &function(MAX_FUNCTION_LINES));
        let no_function = "src/a.rs | type F = fn(u8); trait T { fn f(); } mod m ";
        passes(function_length, &format!("{no_function}{}", body(99)));
    }

    #[test]
    fn unfinished_work_is_found() {
        let samples = r#"
            tests/a.rs | todo!()
            tests/a.rs | unimplemented!("x")
            tests/a.rs | dbg!(1)
            tests/a.rs | #[ignore] fn f() {}
            tests/a.rs | #[ignore = "slow"] fn f() {}
            tests/a.rs | #[cfg_attr(miri, ignore)] fn f() {}"#;
        bites(unfinished, samples);
        let sample = r#"tests/a.rs | // todo!\nconst S: &str = "dbg!"; let ignore = a[1];"#;
        passes(unfinished, sample);
    }

    #[test]
    fn documents_are_read_for_paths() {
        let exists = |path: &str| path == "flow/tcp.rs";
        let text = "See `flow/tcp.rs`, then\n`gone/away.rs` and `src/*.rs`, `no_slash.rs`.";
        let found = document_paths(text, &exists);
        assert_eq!(found, [(2, "no file `gone/away.rs`".to_owned())]);
    }

    #[test]
    fn comments_and_literals_are_no_tokens() {
        let text = concat!(
            r#"a /* b /* c */ d */ e "f \" g" '"' h '\\' b'i' '\u{1}' <'j> // k "#,
            "\n",
            r##"l::m br#"n" o"# r#fn r"" p"##
        );
        let found = tokenize(text);
        let texts: Vec<&str> = found.iter().map(|token| token.text.as_str()).collect();
        let expected = "a e h b < ' j > l :: m r # fn p";
        assert_eq!(texts, expected.split(' ').collect::<Vec<_>>());
        assert_eq!(found.last().map(|token| token.line), Some(2));
    }

    #[test]
    fn test_files_are_known_by_their_declaration() {
        let source = Source::new("src/flow/tcp.rs", "#[cfg(test)]\nmod tests;\nmod device;");
        assert_eq!(test_modules(&source), [["flow", "tcp", "tests"]]);
    }
}
