//! The commands that saving and reverting use, with typed arguments and answers
//! (QEMU's "QMP Reference Manual", `docs/interop/qemu-qmp-ref`).

use std::os::fd::BorrowedFd;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{Qmp, QmpError};

/// The state of a migration (`query-migrate`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct MigrationInfo {
    /// `none`, `setup`, `active`, `postcopy-active`, `completed`, `failed`, …;
    /// `None` when no migration has been tried yet.
    pub status: Option<String>,
    /// Why it failed, in QEMU's words.
    pub error_desc: Option<String>,
    /// What blocks any migration, such as a device that can't be migrated.
    pub blocked_reasons: Vec<String>,
    /// How much memory was sent; absent before the first migration.
    pub ram: Option<RamInfo>,
}

/// How much memory a migration has sent (`MigrationStats`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RamInfo {
    /// Bytes sent so far.
    pub transferred: u64,
    /// Bytes still to be sent.
    pub remaining: u64,
    /// Bytes of guest memory altogether.
    pub total: u64,
    /// Pages sent as ordinary pages.
    pub normal: u64,
    /// Pages sent as all zero.
    pub duplicate: u64,
    /// Requests that came from the destination of a postcopy migration.
    pub postcopy_requests: u64,
}

/// A RAMBlock as `x-query-ramblock` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name of the block, as in the migration stream.
    pub name: String,
    /// Size of the host pages behind it, in bytes.
    pub page_size: u64,
    /// Used length in bytes: what is migrated.
    pub used_len: u64,
    /// The length in bytes that it can grow to.
    pub total_len: u64,
    /// Where it begins in QEMU's address space; none where QEMU does not tell (7.2 does not).
    pub address: Option<u64>,
}

/// A block device as `query-block` lists it, with the medium in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// The backend's name; empty when it was made by `-blockdev`.
    pub device: String,
    /// The guest device's id or QOM path; `None` when no guest device uses it.
    pub qdev: Option<String>,
    /// The medium's node name; `None` when there is no medium.
    pub node_name: Option<String>,
    /// The medium's file name as QEMU knows it (may be a `json:` description).
    pub file: Option<String>,
    /// The medium's format driver, such as `qcow2`.
    pub driver: Option<String>,
    /// Whether there is a medium and the guest may write to it.
    pub writable: bool,
    /// Whether the medium can be removed, as of a CD drive.
    pub removable: bool,
    /// The medium's internal snapshots.
    pub snapshots: Vec<String>,
}

impl Qmp {
    /// The run state, such as `running`, `paused`, `inmigrate` (`query-status`).
    ///
    /// # Errors
    /// As [`Qmp::execute`]; so for all commands below.
    pub async fn status(&self) -> Result<String, QmpError> {
        #[derive(Deserialize)]
        struct Status {
            status: String,
        }
        self.query::<Status>("query-status", ()).await.map(|answer| answer.status)
    }

    /// Pauses the guest.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.execute("stop", ()).await.map(drop)
    }

    /// Lets the guest run.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.execute("cont", ()).await.map(drop)
    }

    /// Ends QEMU. A connection that closes without an answer is success: QEMU 11 may exit before
    /// it has answered.
    #[cfg(test)]
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.execute("quit", ()).await {
            Ok(_) | Err(QmpError::Gone { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The versioned machine type, such as `pc-i440fx-7.2`: the type of `/machine`
    /// in QEMU's object tree, without its suffix `-machine`.
    pub async fn machine_type(&self) -> Result<String, QmpError> {
        let arguments = json!({ "path": "/machine", "property": "type" });
        let name: String = self.query("qom-get", arguments).await?;
        Ok(name.strip_suffix("-machine").unwrap_or(&name).to_owned())
    }

    /// Every migration capability that this QEMU knows, and whether it is on.
    pub async fn migration_capabilities(&self) -> Result<Vec<(String, bool)>, QmpError> {
        #[derive(Deserialize)]
        struct Capability {
            capability: String,
            state: bool,
        }
        let list: Vec<Capability> = self.query("query-migrate-capabilities", ()).await?;
        Ok(list.into_iter().map(|item| (item.capability, item.state)).collect())
    }

    /// Turns migration capabilities on or off. QEMU refuses combinations that
    /// don't work, before anything has happened to the guest.
    pub async fn set_migration_capabilities(
        &self,
        capabilities: &[(&str, bool)],
    ) -> Result<(), QmpError> {
        let list: Vec<Value> = capabilities
            .iter()
            .map(|(name, on)| json!({ "capability": name, "state": on }))
            .collect();
        let arguments = json!({ "capabilities": list });
        self.execute("migrate-set-capabilities", arguments).await.map(drop)
    }

    /// The state of the current or last migration.
    pub async fn migration_info(&self) -> Result<MigrationInfo, QmpError> {
        self.query("query-migrate", ()).await
    }

    /// Starts a migration to `uri`, such as `fd:NAME` or `unix:PATH`.
    pub async fn migrate(&self, uri: &str) -> Result<(), QmpError> {
        self.execute("migrate", json!({ "uri": uri })).await.map(drop)
    }

    /// Starts to listen for a migration at `uri`; QEMU must have been started
    /// with `-incoming defer`.
    pub async fn migrate_incoming(&self, uri: &str) -> Result<(), QmpError> {
        self.execute("migrate-incoming", json!({ "uri": uri })).await.map(drop)
    }

    /// Has a postcopy migration that was interrupted go on by the connection at `uri`.
    pub async fn migrate_recover(&self, uri: &str) -> Result<(), QmpError> {
        self.execute("migrate-recover", json!({ "uri": uri })).await.map(drop)
    }

    /// Cancels the running migration, if there is one.
    pub async fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.execute("migrate_cancel", ()).await.map(drop)
    }

    /// Passes a copy of a descriptor to QEMU under a name, for `fd:NAME`.
    pub async fn getfd(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        self.execute_with_fd("getfd", json!({ "fdname": name }), fd).await.map(drop)
    }

    /// Closes a descriptor that was passed by [`Qmp::getfd`] and not used yet.
    pub async fn closefd(&self, name: &str) -> Result<(), QmpError> {
        self.execute("closefd", json!({ "fdname": name })).await.map(drop)
    }

    /// The guest's RAMBlocks. QEMU lists them for people only: the table comes
    /// from `x-query-ramblock` (QEMU 6.2 and later), or else the human monitor's
    /// `info ramblock`.
    ///
    /// # Errors
    /// [`QmpError::UnexpectedAnswer`] when the table is of an unknown form.
    pub async fn ram_blocks(&self) -> Result<Vec<RamBlock>, QmpError> {
        let command = "x-query-ramblock";
        let table = match self.execute(command, ()).await {
            Ok(answer) => answer["human-readable-text"].as_str().map(str::to_owned),
            Err(error) if error.is_command_not_found() => {
                let arguments = json!({ "command-line": "info ramblock" });
                Some(self.query("human-monitor-command", arguments).await?)
            }
            Err(error) => return Err(error),
        };
        parse_ram_blocks(&table.unwrap_or_default())
            .map_err(|problem| QmpError::UnexpectedAnswer { command: command.to_owned(), problem })
    }

    /// The block devices and what is in them (`query-block`).
    pub async fn block_devices(&self) -> Result<Vec<BlockDevice>, QmpError> {
        let list: Vec<BlockInfo> = self.query("query-block", ()).await?;
        Ok(list.into_iter().map(BlockDevice::from).collect())
    }

    /// Executes a command whose result has the form of `T`.
    ///
    /// # Errors
    /// As [`Qmp::execute`], and [`QmpError::UnexpectedAnswer`].
    pub async fn query<T: DeserializeOwned>(
        &self,
        command: &str,
        arguments: impl serde::Serialize,
    ) -> Result<T, QmpError> {
        let answer = self.execute(command, arguments).await?;
        serde_json::from_value(answer).map_err(|error| QmpError::UnexpectedAnswer {
            command: command.to_owned(),
            problem: error.to_string(),
        })
    }
}

/// The parts of QEMU's `BlockInfo` that we read.
#[derive(Deserialize)]
struct BlockInfo {
    #[serde(default)]
    device: String,
    qdev: Option<String>,
    #[serde(default)]
    removable: bool,
    inserted: Option<Inserted>,
}

#[derive(Deserialize)]
struct Inserted {
    file: String,
    #[serde(rename = "node-name")]
    node_name: Option<String>,
    drv: String,
    ro: bool,
    #[serde(default)]
    image: Medium,
}

#[derive(Default, Deserialize)]
struct Medium {
    #[serde(default)]
    snapshots: Vec<Snapshot>,
}

#[derive(Deserialize)]
struct Snapshot {
    name: String,
}

impl From<BlockInfo> for BlockDevice {
    fn from(info: BlockInfo) -> Self {
        let writable = info.inserted.as_ref().is_some_and(|medium| !medium.ro);
        let (node_name, file, driver, image) = match info.inserted {
            Some(medium) => (medium.node_name, Some(medium.file), Some(medium.drv), medium.image),
            None => (None, None, None, Medium::default()),
        };
        BlockDevice {
            device: info.device,
            qdev: info.qdev.filter(|qdev| !qdev.is_empty()),
            node_name,
            file,
            driver,
            writable,
            removable: info.removable,
            snapshots: image.snapshots.into_iter().map(|snapshot| snapshot.name).collect(),
        }
    }
}

/// Reads the table of RAMBlocks. Its columns are `Block Name`, `PSize` (a number
/// and a unit), `Offset`, `Used`, `Total`, and more in later versions; names may
/// hold spaces, so a line is read from its end.
pub(super) fn parse_ram_blocks(table: &str) -> Result<Vec<RamBlock>, String> {
    let mut lines = table.lines();
    let header = lines.next().unwrap_or_default();
    let columns: Vec<&str> = match header.trim().strip_prefix("Block Name") {
        Some(rest) => rest.split_whitespace().collect(),
        None => return Err(format!("a table of RAMBlocks that starts with {header:?}")),
    };
    if !columns.starts_with(&["PSize", "Offset", "Used", "Total"]) {
        return Err(format!("a table of RAMBlocks with the columns {header:?}"));
    }
    // A backend that nothing uses has no name, and is not saved.
    let is_nameless = |line: &&str| {
        let mut words = line.split_whitespace();
        words.clone().count() == columns.len() + 1
            && words.next().is_some_and(|word| word.parse::<u64>().is_ok())
    };
    lines
        .filter(|line| !line.trim().is_empty() && !is_nameless(line))
        .map(|line| {
            parse_ram_block(line, &columns)
                .ok_or_else(|| format!("a RAMBlock described as {line:?}"))
        })
        .collect()
}

fn parse_ram_block(line: &str, columns: &[&str]) -> Option<RamBlock> {
    // The page size takes two words.
    let words = columns.len() + 1;
    let mut fields = Vec::with_capacity(words + 1);
    let mut rest = line.trim();
    for _ in 0..words {
        let (before, word) = rest.rsplit_once(char::is_whitespace)?;
        fields.push(word);
        rest = before.trim_end();
    }
    fields.push(rest);
    fields.reverse();
    let [name, number, unit, _offset, used, total, ..] = fields[..] else { return None };
    let unit = match unit {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let page_size = number.parse::<u64>().ok()?.checked_mul(unit)?;
    if name.is_empty() || !page_size.is_power_of_two() {
        return None;
    }
    // Behind the name and the second word of the page size.
    let column = columns.iter().position(|column| *column == "HVA");
    let address = column.and_then(|column| hex(fields[column + 2]));
    Some(RamBlock {
        name: name.to_owned(),
        page_size,
        used_len: hex(used)?,
        total_len: hex(total)?,
        address,
    })
}
