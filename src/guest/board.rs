//! What differs between the kinds of machines that are known.

/// A kind of machine: what a machine type is without its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Board {
    /// A PC with the chipset i440FX: `pc`.
    I440fx,
    /// A PC with the chipset Q35: `q35`.
    Q35,
    /// ARM's `virt`, of 64 or of 32 bits.
    ArmVirt,
}

impl Board {
    const ALL: [Board; 3] = [Board::I440fx, Board::Q35, Board::ArmVirt];

    /// The board of a versioned machine type, as a stream's configuration section names it
    /// (for example `pc-i440fx-7.2`).
    pub fn of(machine_type: &str) -> Option<Board> {
        // What is called `virt` without a version is another architecture's.
        Board::ALL.into_iter().find(|board| machine_type.starts_with(board.prefix()))
    }

    /// How its versioned machine types begin.
    fn prefix(self) -> &'static str {
        match self {
            Board::I440fx => "pc-i440fx-",
            Board::Q35 => "pc-q35-",
            Board::ArmVirt => "virt-",
        }
    }

    /// The name that stands for its latest machine type, another in every version of QEMU.
    pub fn alias(self) -> &'static str {
        match self {
            Board::I440fx => "pc",
            Board::Q35 => "q35",
            Board::ArmVirt => "virt",
        }
    }

    /// The name of the RAMBlock that is main memory where no backend gives it
    /// (`default_ram_id` of QEMU's `MachineClass`).
    pub fn main_memory(self) -> &'static str {
        match self {
            Board::I440fx | Board::Q35 => "pc.ram",
            Board::ArmVirt => "mach-virt.ram",
        }
    }

    /// The names that main memory has on any board, each once.
    pub fn main_memories() -> impl Iterator<Item = &'static str> {
        [Board::Q35, Board::ArmVirt].into_iter().map(Board::main_memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_types_name_their_boards() {
        assert_eq!(Board::of("pc-i440fx-7.2"), Some(Board::I440fx));
        assert_eq!(Board::of("pc-q35-10.0"), Some(Board::Q35));
        let virt = Board::of("virt-7.2").unwrap();
        assert_eq!((virt.alias(), virt.main_memory()), ("virt", "mach-virt.ram"));
        for other in ["virt", "microvm", "pc-0.12", "pseries-7.2", ""] {
            assert_eq!(Board::of(other), None, "{other}");
        }
    }
}
