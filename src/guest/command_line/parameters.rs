//! The two spellings of an option's value: `key=value,…` lists and JSON.

use std::fmt;

use serde_json::Value;

/// A list such as `socket,id=c,path=/a,,b,server=on`. A comma that belongs to a
/// value is doubled (QEMU's `-help`, "Use ,, for a comma"). Parsing and
/// printing is lossless.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    /// `key=value`, or `flag`, or the value whose key is implied (only the first
    /// may be that); commas not doubled.
    items: Vec<String>,
}

impl Params {
    /// Splits a list at its single commas. Every text is a list.
    pub fn parse(text: &str) -> Params {
        let mut items = vec![String::new()];
        let mut rest = text.chars().peekable();
        while let Some(c) = rest.next() {
            if c == ',' && rest.next_if_eq(&',').is_none() {
                items.push(String::new());
            } else if let Some(item) = items.last_mut() {
                item.push(c);
            }
        }
        Params { items }
    }

    /// The items, commas not doubled.
    pub fn items(&self) -> &[String] {
        &self.items
    }

    /// The items, to be changed.
    pub fn items_mut(&mut self) -> &mut Vec<String> {
        &mut self.items
    }

    /// The first item, if its key is implied.
    pub fn implied(&self) -> Option<&str> {
        self.items.first().map(String::as_str).filter(|item| !item.contains('='))
    }

    /// The value given with `key=`; the last one counts, as it does for QEMU.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.items.iter().rev().find_map(|item| item.strip_prefix(key)?.strip_prefix('='))
    }

    /// What `key` is set to, by `key=on`, or a lone `key` or `nokey`.
    /// `None` when it is not given.
    pub fn flag(&self, key: &str) -> Option<bool> {
        self.items.iter().rev().find_map(|item| match item.split_once('=') {
            Some((found, value)) if found == key => Some(is_on(value)),
            Some(_) => None,
            None if item == key => Some(true),
            None if item.strip_prefix("no") == Some(key) => Some(false),
            None => None,
        })
    }

    /// Sets `key` to this value, at its first position or else at the end.
    pub fn set(&mut self, key: &str, value: &str) {
        let at = self.items.iter().position(|item| names(item, key)).unwrap_or(self.items.len());
        self.remove(key);
        self.items.insert(at, format!("{key}={value}"));
    }

    /// Removes every item about `key`, including `nokey`.
    pub fn remove(&mut self, key: &str) {
        self.items.retain(|item| !names(item, key));
    }
}

/// Whether an item is about `key`.
fn names(item: &str, key: &str) -> bool {
    match item.split_once('=') {
        Some((found, _)) => found == key,
        None => item == key || item.strip_prefix("no") == Some(key),
    }
}

/// QEMU's words for yes (`qapi_bool_parse`).
fn is_on(value: &str) -> bool {
    ["on", "yes", "true", "y"].iter().any(|word| value.eq_ignore_ascii_case(word))
}

impl fmt::Display for Params {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, item) in self.items.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{}", item.replace(',', ",,"))?;
        }
        Ok(())
    }
}

/// An option's value in whichever spelling it was given. Keys are dotted, as
/// `addr.type`; in JSON each part names a member of the one before.
#[derive(Debug, Clone, PartialEq)]
pub enum Spec {
    /// A `key=value,…` list.
    Params(Params),
    /// A JSON object, as libvirt writes them.
    Json(Value),
}

impl Spec {
    /// Reads a value; what starts with `{` and is JSON is taken as JSON.
    pub fn parse(text: &str) -> Spec {
        match text.starts_with('{').then(|| serde_json::from_str(text)) {
            Some(Ok(value)) => Spec::Json(value),
            _ => Spec::Params(Params::parse(text)),
        }
    }

    /// The text at `key`.
    pub fn get(&self, key: &str) -> Option<&str> {
        match self {
            Spec::Params(params) => params.get(key),
            Spec::Json(value) => member(value, key)?.as_str(),
        }
    }

    /// The text at `key`, or the first item when its key is implied.
    pub fn get_or_implied(&self, key: &str) -> Option<&str> {
        match self {
            Spec::Params(params) => params.get(key).or_else(|| params.implied()),
            Spec::Json(_) => self.get(key),
        }
    }

    /// The switch at `key`.
    pub fn flag(&self, key: &str) -> Option<bool> {
        match self {
            Spec::Params(params) => params.flag(key),
            Spec::Json(value) => match member(value, key)? {
                Value::Bool(on) => Some(*on),
                other => other.as_str().map(is_on),
            },
        }
    }

    /// Sets the switch at `key`; in JSON only where the parts before the last
    /// one exist.
    pub fn set_flag(&mut self, key: &str, on: bool) {
        match self {
            Spec::Params(params) => params.set(key, if on { "on" } else { "off" }),
            Spec::Json(value) => set_member(value, key, Value::Bool(on)),
        }
    }

    /// Sets the text at `key`; in JSON only where the parts before the last one exist.
    pub fn set(&mut self, key: &str, text: &str) {
        match self {
            Spec::Params(params) => params.set(key, text),
            Spec::Json(value) => set_member(value, key, Value::String(text.to_owned())),
        }
    }

    /// Changes texts: `change` is called with each one's key, as [`leaves`](Spec::leaves) gives
    /// it, and the text.
    pub fn change_texts(&mut self, change: &mut dyn FnMut(&str, &mut String)) {
        match self {
            Spec::Params(params) => {
                for (i, item) in params.items_mut().iter_mut().enumerate() {
                    match item.split_once('=') {
                        Some((key, value)) => {
                            let (key, mut value) = (key.to_owned(), value.to_owned());
                            change(&key, &mut value);
                            *item = format!("{key}={value}");
                        }
                        None if i == 0 => change("", item),
                        None => {}
                    }
                }
            }
            Spec::Json(value) => change_members(value, "", change),
        }
    }

    /// Every key with its value as text, at any depth. A lone flag has an empty
    /// value, an implied key is empty.
    pub fn leaves(&self) -> Vec<(String, String)> {
        match self {
            Spec::Params(params) => params
                .items()
                .iter()
                .enumerate()
                .map(|(i, item)| match item.split_once('=') {
                    Some((key, value)) => (key.to_owned(), value.to_owned()),
                    None if i == 0 => (String::new(), item.clone()),
                    None => (item.clone(), String::new()),
                })
                .collect(),
            Spec::Json(value) => {
                let mut leaves = Vec::new();
                json_leaves(value, "", &mut leaves);
                leaves
            }
        }
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Spec::Params(params) => params.fmt(f),
            Spec::Json(value) => value.fmt(f),
        }
    }
}

/// A dotted key as a JSON pointer (RFC 6901).
fn pointer(key: &str) -> String {
    format!("/{}", key.replace('.', "/"))
}

fn member<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    value.pointer(&pointer(key))
}

/// Sets a member of an object that exists.
fn set_member(value: &mut Value, key: &str, new: Value) {
    let (parent, last) = match key.rsplit_once('.') {
        Some((parent, last)) => (value.pointer_mut(&pointer(parent)), last),
        None => (Some(value), key),
    };
    if let Some(Value::Object(members)) = parent {
        members.insert(last.to_owned(), new);
    }
}

/// The key of a part below `key`.
fn below(key: &str, part: &str) -> String {
    match key {
        "" => part.to_owned(),
        key => format!("{key}.{part}"),
    }
}

/// Depth is bounded as in [`json_leaves`].
fn change_members(value: &mut Value, key: &str, change: &mut dyn FnMut(&str, &mut String)) {
    match value {
        Value::Object(members) => {
            members.iter_mut().for_each(|(part, value)| {
                change_members(value, &below(key, part), change);
            });
        }
        Value::Array(items) => {
            items.iter_mut().enumerate().for_each(|(i, value)| {
                change_members(value, &below(key, &i.to_string()), change);
            });
        }
        Value::String(text) => change(key, text),
        _ => {}
    }
}

/// Depth is bounded by serde_json, which reads at most 128 levels.
fn json_leaves(value: &Value, key: &str, leaves: &mut Vec<(String, String)>) {
    match value {
        Value::Object(members) => {
            members.iter().for_each(|(part, value)| json_leaves(value, &below(key, part), leaves));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, value)| {
                json_leaves(value, &below(key, &i.to_string()), leaves);
            });
        }
        Value::String(text) => leaves.push((key.to_owned(), text.clone())),
        other => leaves.push((key.to_owned(), other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lists_are_read_as_qemu_reads_them() {
        let params = Params::parse("socket,id=a,path=/x,,y,server,nowait,id=b");
        assert_eq!(params.implied(), Some("socket"));
        assert_eq!(params.get("id"), Some("b"));
        assert_eq!(params.get("path"), Some("/x,y"));
        assert_eq!(params.get("pat"), None);
        assert_eq!((params.flag("server"), params.flag("wait")), (Some(true), Some(false)));
        assert_eq!(Params::parse("id=x,server=yes").flag("server"), Some(true));
        assert_eq!(Params::parse("id=x").implied(), None);
    }

    #[test]
    fn changes_stay_in_place() {
        let mut params = Params::parse("socket,nowait,id=a,wait=on");
        params.set("wait", "off");
        assert_eq!(params.to_string(), "socket,wait=off,id=a");
        params.set("path", "/a,b");
        params.remove("id");
        assert_eq!(params.to_string(), "socket,wait=off,path=/a,,b");
    }

    #[test]
    fn json_and_lists_answer_alike() {
        let text = r#"{"driver":"x","on":true,"addr":{"type":"fd","str":"3"},"n":[1,2]}"#;
        let mut json = Spec::parse(text);
        let list = Spec::parse("x,on=on,addr.type=fd,addr.str=3");
        for spec in [&json, &list] {
            assert_eq!(spec.get_or_implied("driver"), Some("x"));
            assert_eq!(spec.get("addr.type"), Some("fd"));
            assert_eq!(spec.flag("on"), Some(true));
            assert!(spec.leaves().contains(&("addr.str".to_owned(), "3".to_owned())));
        }
        json.set_flag("on", false);
        json.set_flag("addr.new", true);
        assert_eq!((json.flag("on"), json.flag("addr.new")), (Some(false), Some(true)));
        assert!(json.leaves().contains(&("n.1".to_owned(), "2".to_owned())));
        for spec in [&mut json, &mut Spec::parse("x,on=on,addr.type=fd,addr.str=3")] {
            spec.set("addr.type", "inet");
            spec.change_texts(&mut |key, text| {
                if key == "addr.str" {
                    text.push('4');
                }
            });
            assert_eq!((spec.get("addr.type"), spec.get("addr.str")), (Some("inet"), Some("34")));
        }
        assert!(matches!(Spec::parse("{broken"), Spec::Params(_)));
    }

    proptest! {
        #[test]
        fn lists_are_lossless(text in "[a-c,=]{0,12}|.{0,20}") {
            prop_assert_eq!(Params::parse(&text).to_string(), text);
        }
    }
}
