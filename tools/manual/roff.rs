//! Manual pages made of Markdown, as far as the documentation uses it.

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

/// What the pages belong to.
pub const SOURCE: &str = concat!("snapback ", env!("CARGO_PKG_VERSION"));

/// Text of a line. A period or an apostrophe at the beginning of a line would be a command.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace('\'', "\\(aq")
}

/// The same where lines are kept as they are.
fn escaped_lines(text: &str) -> String {
    let line = |line: &str| match line.starts_with('.') {
        true => format!("\\&{}", escaped(line)),
        false => escaped(line),
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// The beginning of a page.
pub fn head(name: &str, section: &str, about: &str) -> String {
    let (title, about) = (escaped(&name.to_uppercase()), escaped(about));
    let name = escaped(name);
    format!(
        ".TH \"{title}\" \"{section}\" \"\" \"{SOURCE}\" \"snapback\"\n.SH NAME\n{name} \\- {about}\n"
    )
}

/// A section of paragraphs. Those that are indented keep their lines.
pub fn notes(text: &str) -> String {
    let paragraphs = text.split("\n\n").map(|text| match text.starts_with(' ') {
        true => format!(".PP\n.nf\n{}\n.fi\n", escaped_lines(text)),
        false => format!(".PP\n{}\n", escaped_lines(text)),
    });
    format!(".SH NOTES\n{}", paragraphs.collect::<String>())
}

/// How many columns a terminal of 80 has for an example.
const COLUMNS: usize = 66;

/// A command, which goes on behind a backslash, before an option, where it is longer than that. It is pasted
/// into a shell as before.
fn folded(command: &str) -> String {
    let mut lines = vec![String::new()];
    for piece in command.split(" --").enumerate().map(|(n, piece)| match n {
        0 => piece.to_owned(),
        _ => format!(" --{piece}"),
    }) {
        let open = lines.len() - 1;
        match lines[open].is_empty() || lines[open].len() + piece.len() <= COLUMNS {
            true => lines[open] += &piece,
            false => lines.push(format!("   {piece}")),
        }
    }
    lines.join(" \\\n")
}

/// The section of examples; nothing of none.
pub fn examples(examples: &[(&str, &str)]) -> String {
    let mut text = String::new();
    for (wanted, line) in examples {
        let (wanted, line) = (escaped(wanted), escaped_lines(&folded(line)));
        text += &format!(".PP\n{wanted}:\n.PP\n.RS 4\n.nf\n$ {line}\n.fi\n.RE\n");
    }
    if examples.is_empty() { text } else { format!(".SH EXAMPLES\n{text}") }
}

/// The last section.
pub fn see_also(pages: &str) -> String {
    format!(".SH \"SEE ALSO\"\n{}\n", escaped(pages))
}

/// A page's sections. Its first heading is the page's name, and left out.
pub fn of_markdown(markdown: &str) -> String {
    let mut writer = Writer::default();
    for event in Parser::new_ext(markdown, Options::ENABLE_TABLES) {
        writer.event(event);
    }
    writer.finish_line();
    writer.text
}

#[derive(Default)]
struct Writer {
    text: String,
    /// What belongs to one line, or to one cell.
    line: String,
    /// What the line is put into, where it is a heading.
    heading: Option<&'static str>,
    /// The first heading is being left out.
    skipped: bool,
    seen_title: bool,
    literal: bool,
    /// The numbers of the lists that are open; none of one without numbers.
    lists: Vec<Option<u64>>,
    /// The next paragraph goes on with the item that has begun.
    in_item: bool,
    table: Table,
}

/// A table becomes a list: its first column is what the others tell about.
#[derive(Default)]
struct Table {
    head: Vec<String>,
    row: Vec<String>,
    in_head: bool,
}

impl Writer {
    fn event(&mut self, event: Event) {
        match event {
            Event::Start(tag) => self.start(tag),
            Event::End(tag) => self.end(tag),
            Event::Text(text) if self.literal => self.text += &(escaped_lines(&text) + "\n"),
            Event::Text(text) => self.line += &escaped(&text),
            Event::Code(code) => self.line += &format!("\\fB{}\\fR", escaped(&code)),
            Event::SoftBreak | Event::HardBreak => self.line.push(' '),
            _ => {}
        }
    }

    fn start(&mut self, tag: Tag) {
        match tag {
            Tag::Heading { level, .. } => {
                self.finish_line();
                self.skipped = !self.seen_title && level as usize == 1;
                self.seen_title = true;
                self.heading = Some(if level as usize <= 2 { ".SH" } else { ".SS" });
            }
            Tag::Paragraph => {
                self.finish_line();
                // Text below the page's name is in no section yet.
                if self.skipped {
                    self.skipped = false;
                    self.text += ".SH DESCRIPTION\n";
                } else if !std::mem::take(&mut self.in_item) {
                    self.text += if self.lists.is_empty() { ".PP\n" } else { ".IP\n" };
                }
            }
            Tag::CodeBlock(kind) => {
                self.finish_line();
                debug_assert!(matches!(kind, CodeBlockKind::Fenced(_) | CodeBlockKind::Indented));
                self.literal = true;
                self.text += ".PP\n.RS 4\n.nf\n";
            }
            Tag::List(number) => {
                self.finish_line();
                if !self.lists.is_empty() {
                    self.text += ".RS 4\n";
                }
                self.lists.push(number);
            }
            Tag::Item => {
                self.finish_line();
                let mark = match self.lists.last_mut() {
                    Some(Some(number)) => {
                        *number += 1;
                        format!("{}.", *number - 1)
                    }
                    _ => "\\(bu".into(),
                };
                self.text += &format!(".IP {mark} 4\n");
                self.in_item = true;
            }
            Tag::BlockQuote(_) => {
                self.finish_line();
                self.text += ".RS 4\n";
            }
            Tag::Table(_) => self.finish_line(),
            Tag::TableHead => self.table = Table { in_head: true, ..Table::default() },
            Tag::Strong => self.line += "\\fB",
            Tag::Emphasis => self.line += "\\fI",
            _ => {}
        }
    }

    fn end(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Heading(_) => {
                let (line, command) = (std::mem::take(&mut self.line), self.heading.take());
                if self.skipped {
                    return;
                }
                let line = if command == Some(".SH") { line.to_uppercase() } else { line };
                // Upper case must not change what chooses a font.
                let line = line.replace("\\FB", "").replace("\\FR", "").replace("\\FI", "");
                let line = line.replace("\\fB", "").replace("\\fR", "").replace("\\(AQ", "'");
                self.text += &format!("{} \"{line}\"\n", command.unwrap_or(".SH"));
            }
            TagEnd::CodeBlock => {
                self.literal = false;
                self.text += ".fi\n.RE\n";
            }
            TagEnd::List(_) => {
                self.finish_line();
                self.lists.pop();
                self.in_item = false;
                self.text += if self.lists.is_empty() { "" } else { ".RE\n" };
            }
            TagEnd::BlockQuote(_) => {
                self.finish_line();
                self.text += ".RE\n";
            }
            TagEnd::Paragraph | TagEnd::Item => self.finish_line(),
            TagEnd::Strong | TagEnd::Emphasis => self.line += "\\fR",
            TagEnd::TableCell => {
                let cell = std::mem::take(&mut self.line);
                match self.table.in_head {
                    true => self.table.head.push(cell),
                    false => self.table.row.push(cell),
                }
            }
            TagEnd::TableHead => self.table.in_head = false,
            TagEnd::TableRow => self.row(),
            _ => {}
        }
    }

    fn row(&mut self) {
        let row = std::mem::take(&mut self.table.row);
        let Some((first, rest)) = row.split_first() else { return };
        self.text += &format!(".TP\n{first}\n");
        let titles = &self.table.head[1.min(self.table.head.len())..];
        let told = match rest {
            [alone] => alone.clone(),
            [kind, meaning] if titles[0] == "type" => format!("({kind}) {meaning}"),
            _ => {
                let told = rest.iter().zip(titles).filter(|(cell, _)| !cell.is_empty());
                let told = told.map(|(cell, title)| match title.is_empty() {
                    true => cell.clone(),
                    false => format!("{title}: {cell}"),
                });
                told.collect::<Vec<_>>().join("; ")
            }
        };
        self.text += &format!("{}\n", if told.is_empty() { "\\&" } else { &told });
    }

    fn finish_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let line = line.trim();
        if line.is_empty() {
            return;
        }
        if line.starts_with('.') {
            self.text += "\\&";
        }
        self.text += line;
        self.text.push('\n');
        self.in_item = false;
    }
}
