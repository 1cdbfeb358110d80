//! Little-endian integers, read and written one after the other.

/// Bytes that are read from the front.
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (front, rest) = self.0.split_at_checked(len).ok_or("it ends too early")?;
        self.0 = rest;
        Ok(front)
    }

    /// The next bytes, as many as an array holds.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    /// A number of records that follow, each `bytes` long at least: no more than there can be.
    pub fn count(&mut self, bytes: usize) -> Result<usize, String> {
        let count = self.u32()? as usize;
        match count.checked_mul(bytes).is_some_and(|len| len <= self.0.len()) {
            true => Ok(count),
            false => Err(format!("{count} records can't lie in {} bytes", self.0.len())),
        }
    }

    /// Nothing may be left.
    pub fn end(self) -> Result<(), String> {
        match self.0 {
            [] => Ok(()),
            rest => Err(format!("{} bytes too many", rest.len())),
        }
    }
}

/// A length as it is written.
pub fn as_u32(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
