//! What a guest is to be given in the place of what all guests of its image share.

use uuid::Uuid;

use crate::guest::GuestError;
use crate::guest::command_line::CommandLine;
use crate::guest::command_line::parameters::Spec;
use crate::guest::start::plan::Note;

/// The device that tells a guest when it has become another (Microsoft's "Virtual Machine
/// Generation ID").
const VMGENID: &str = "vmgenid";

/// Gives the guest a new generation ID. QEMU takes it from the command line, not from the state
/// that it loads: it writes it to the guest's memory then, and notifies the guest.
///
/// # Errors
/// [`GuestError::NoVmgenid`] where the machine has no such device.
pub(super) fn renew_generation(
    line: &mut CommandLine,
    notes: &mut Vec<Note>,
) -> Result<(), GuestError> {
    let new = Uuid::new_v4().to_string();
    let mut found = false;
    let mut ids = Vec::new();
    for option in line.options_mut().filter(|option| option.name() == "device") {
        let mut spec = Spec::parse(option.value());
        if spec.get_or_implied("driver") == Some(VMGENID) {
            spec.set("guid", &new);
            ids.extend(spec.get("id").map(str::to_owned));
            option.value = Some(spec.to_string());
            found = true;
        }
    }
    if !found {
        return Err(GuestError::NoVmgenid);
    }
    // QEMU applies these last.
    line.retain_options(|option| {
        let sets = |id: &String| option.value().starts_with(&format!("device.{id}.guid="));
        option.name() != "set" || !ids.iter().any(sets)
    });
    notes.push(Note::new(
        format!("gave the guest the generation ID {new}"),
        "`RewriteOptions::new_generation`",
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn renewed(args: &[&str]) -> Result<Vec<String>, GuestError> {
        let mut line = CommandLine::parse(args.iter().copied());
        renew_generation(&mut line, &mut Vec::new())?;
        Ok(line.into_args())
    }

    #[test]
    fn a_generation_id_is_replaced_in_every_spelling() {
        const OLD: &str = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";
        for device in [
            &format!("vmgenid,guid={OLD},id=g"),
            "driver=vmgenid,guid=auto",
            "vmgenid",
            &format!(r#"{{"driver":"vmgenid","guid":"{OLD}","id":"g"}}"#),
        ] {
            let [first, second] = [(); 2].map(|()| renewed(&["-device", device]).unwrap());
            assert!(first != second && !first[1].contains(OLD), "{first:?}");
            let spec = Spec::parse(&first[1]);
            assert!(Uuid::parse_str(spec.get("guid").unwrap()).is_ok(), "{first:?}");
        }
        let set = ["-device", "vmgenid,id=g", "-set", "device.g.guid=auto", "-set", "device.h.a=b"];
        assert_eq!(renewed(&set).unwrap()[2..], ["-set", "device.h.a=b"]);
    }

    #[test]
    fn a_machine_without_the_device_is_refused() {
        for args in [&[][..], &["-device", "virtio-net,netdev=vmgenid"]] {
            assert!(matches!(renewed(args), Err(GuestError::NoVmgenid)), "{args:?}");
        }
    }
}
