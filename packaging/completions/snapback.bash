# Loaded by bash-completion at the first TAB behind `snapback`, which it then asks each time.
source <(COMPLETE=bash /usr/bin/snapback)
